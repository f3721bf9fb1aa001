"""What callers have written stays within its line, in logs and on terminals.

A request's id, a name or an address may hold line breaks and a terminal's escape sequences. Shown
as they are, they would be lines of their own, or colours, titles and worse.
"""

import logging
import re

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


class Record(logging.LogRecord):
    """A record whose message is one line, and whose traceback is indented.

    vLLM's own messages may have several lines: its formatter puts its prefix before each.
    """

    _traceback: str | None = None

    def getMessage(self) -> str:
        """The message as it is to be shown."""
        message = super().getMessage()
        return _lines(message) if str(self.name).split(".")[0] == "vllm" else one_line(message)

    @property
    def exc_text(self) -> str | None:
        """The traceback, as it is to be shown; formatters take it instead of making their own."""
        if self._traceback is None and self.exc_info and self.exc_info[0] is not None:
            plain = logging.Formatter().formatException(self.exc_info)
            self._traceback = "\n".join(f"  {line}" for line in _lines(plain).split("\n"))
        return self._traceback

    @exc_text.setter
    def exc_text(self, text: str | None) -> None:
        self._traceback = text


def install() -> None:
    """Have all loggers of this process make such records; before vLLM, which adds to them."""
    logging.setLogRecordFactory(Record)


def in_json(text: str) -> str:
    """Encoded JSON, with those control characters escaped as well that JSON would let through."""
    return _CONTROL_IN_LINES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
