"""What callers have written stays within its line, in logs and on terminals.

A request's id, a name or an address may hold line breaks and a terminal's escape sequences. Shown
as they are, they would be lines of their own, or colours, titles and worse.
"""

import logging
import math
import re
import threading
import time
import traceback
from types import TracebackType
from typing import Any

# Control characters, line and paragraph separators, and what turns the direction of writing.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_CONTROL_IN_LINES = re.compile(f"(?!\n){_CONTROL.pattern}")


def one_line(text: str) -> str:
    """A text with its control characters written out, such as \\n and \\x1b."""
    return _CONTROL.sub(_written, text)


def _lines(text: str) -> str:
    """The same, but for line breaks."""
    return _CONTROL_IN_LINES.sub(_written, text)


def _written(found: "re.Match[str]") -> str:
    return found[0].encode("unicode_escape").decode()


# Characters of a message of a library's, which may repeat what a caller has sent: of a warning or
# an error, and of any other, as a configuration at start or a prompt that an operator wants logged.
SHOWN, SHOWN_OF_FACTS = 2_000, 16_384
_BRIEF = 200  # of an error that is told in a line
_LINES = 50  # of such a message; one of more is shown as one

# What vLLM answers with 400 where its handlers have caught it.
_REFUSED = (ValueError, TypeError, OverflowError)
_REFUSED_BY_NAME = "VLLMClientError"
_ROUTES = "vllm.entrypoints."
# What requests bring about again and again is told with its traceback once in so many seconds.
_AGAIN = 60.0
_PLACES = 256  # that are remembered
_CHAIN = 8  # exceptions that are looked at of those that have brought about another
_REPEATED = ("vllm.", "llumnix.server.")
_ASKED_FOR = "vllm.entrypoints.serve.exception_handling."  # by --log-error-stack

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def cut(text: str, most: int = SHOWN) -> str:
    """A text, or as much of it as is to be shown."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


class Record(logging.LogRecord):
    """A record whose message is one line, and whose traceback is indented.

    vLLM's own messages may have several lines: its formatter puts its prefix before each. A
    message of another's is cut, and so is the text of an exception. Where one of vLLM's routes
    refuses a request, the record tells of it in a line, and has no traceback; nor has one of an
    exception that a request has brought about at the same place a moment before.
    """

    _traceback: str | None = None
    _in_a_line: BaseException | None = None  # instead of a traceback

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        info = self.exc_info
        if not isinstance(info, tuple) or info[1] is None:
            return
        if _is_refusal(self.name, info[1]) or _was_told(self.name, info[1]):
            self._in_a_line = info[1]
            self.exc_info = None

    def getMessage(self) -> str:
        """The message as it is to be shown."""
        message = super().getMessage()
        if self._in_a_line is not None:
            message = _brief(message, self._in_a_line)
        package = str(self.name).split(".")[0]
        if package != "llumnix":
            message = cut(message, SHOWN if self.levelno >= logging.WARNING else SHOWN_OF_FACTS)
        lines = package == "vllm" and message.count("\n") < _LINES
        return _lines(message) if lines else one_line(message)

    @property
    def exc_text(self) -> str | None:
        """The traceback, as it is to be shown; formatters take it instead of making their own."""
        if self._traceback is None and self.exc_info and self.exc_info[0] is not None:
            plain = _told(self.exc_info)
            self._traceback = "\n".join(f"  {line}" for line in _lines(plain).split("\n"))
        return self._traceback

    @exc_text.setter
    def exc_text(self, text: str | None) -> None:
        self._traceback = text


def _told(info: ExcInfo) -> str:
    """A traceback, in which each exception's text is cut."""
    told = traceback.TracebackException(*info)
    return "".join(f"{cut(piece.rstrip())}\n" for piece in told.format()).rstrip("\n")


def _is_refusal(logger: str, error: BaseException) -> bool:
    """Whether an error that was caught in one of vLLM's routes is the caller's."""
    if not logger.startswith(_ROUTES) or logger.startswith(_ASKED_FOR):
        return False
    names = (kind.__name__ for kind in type(error).__mro__)
    return isinstance(error, _REFUSED) or _REFUSED_BY_NAME in names


_told_at: dict[tuple[str, ...], float] = {}  # by logger, types and places; the oldest first
_telling = threading.Lock()


def _was_told(logger: str, error: BaseException) -> bool:
    """Whether such an exception's traceback has just been shown; if not, it is now."""
    if not logger.startswith(_REPEATED) or logger.startswith(_ASKED_FOR):
        return False
    key = (logger, *(f"{type(one).__name__} {_place(one)}" for one in _chain(error)))
    now = time.monotonic()
    with _telling:
        if now - _told_at.get(key, -math.inf) < _AGAIN:
            return True
        _told_at.pop(key, None)
        _told_at[key] = now
        if len(_told_at) > _PLACES:
            del _told_at[next(iter(_told_at))]
    return False


def _chain(error: BaseException) -> list[BaseException]:
    """The exception, and those that have brought it about, as many as a traceback is read for."""
    found: list[BaseException] = []
    rest = [error]
    while rest and len(found) < _CHAIN:
        one = rest.pop()
        if one in found:
            continue
        found.append(one)
        rest += getattr(one, "exceptions", ())  # of a group
        cause = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        rest += [cause] if cause is not None else []
    return found


def _place(error: BaseException) -> str:
    """Where it was raised, as file and line."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last is not None else ""


def _brief(message: str, error: BaseException) -> str:
    """A message with what an error says, and whence, as it may be a fault after all."""
    text = str(error)
    short = cut(text, _BRIEF)
    said = message.replace(text, short) if text and text in message else f"{message}: {short}"
    place = _place(error)
    return f"{said} ({type(error).__name__}{' at ' if place else ''}{place})"


def install() -> None:
    """Have all loggers of this process make such records; before vLLM, which adds to them."""
    logging.setLogRecordFactory(Record)


def to_stderr(prefix: str = "") -> None:
    """Show llumnix's own log, whatever the libraries do with the root logger."""
    install()
    logger = logging.getLogger("llumnix")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def in_json(text: str) -> str:
    """Encoded JSON, with those control characters escaped as well that JSON would let through."""
    return _CONTROL_IN_LINES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
