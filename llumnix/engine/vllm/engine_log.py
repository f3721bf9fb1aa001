"""An engine's log: a new one for each start, for the eyes of the node's user alone."""

import contextlib
import os
import re
from pathlib import Path

# An exception's own line at the end of a traceback.
_ERROR_LINE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)): (.+)$")
# Exceptions that only say that another one happened elsewhere.
_SECONDARY = ("See stack trace", "See root cause", "initialization failed")

_TAIL = 64 * 1024  # bytes that are searched for why an engine ended


def rotate(log_file: Path) -> None:
    """Make room for a new log, in a folder that is nobody else's; the log before is kept.

    Prompts may be in it, if vLLM is told to log requests.
    """
    folder = log_file.parent
    for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)  # that of an earlier version was open to all
    with contextlib.suppress(FileNotFoundError):
        log_file.replace(log_file.with_name(f"{log_file.name}.1"))


def open_log(log_file: str) -> int:
    """A descriptor to write a log to, which its user alone may read."""
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.fchmod(log, 0o600)  # the umask may have taken from it, and must not
    return log


def last_error(log_file: Path) -> str | None:
    """The most telling exception line in the tail of an engine's log."""
    try:
        with log_file.open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - _TAIL, 0))
            lines = log.read().decode(errors="replace").splitlines()[-400:]
    except OSError:
        return None
    found = [m for line in lines if (m := _ERROR_LINE.search(line))]
    primary = [m for m in found if not any(s in m[2] for s in _SECONDARY)]
    if not found:
        return None
    best = (primary or found)[-1]
    return f"{best[1]}: {best[2]}"
