"""The exception that ended an engine core, and the requests that it had at hand then.

The core leaves both in a file beside its sockets, where its node finds them. So a request that ends
whatever engine takes it up is told from those that only happened to be there.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

VARIABLE = "LLUMNIX_FAULT"  # the file's path, in the processes of an engine
FILE = "fault"


class Fault(msgspec.Struct, frozen=True):
    """An exception of an engine core's own: no worker that was killed, and no signal."""

    exception: str  # its type
    requests: list[str]  # by the names that the engine knows


def write(core: Any) -> None:
    """Leave word, in an engine core that handles the exception which ends it."""
    error, path = sys.exc_info()[1], os.environ.get(VARIABLE)
    at_hand = getattr(core.scheduler, "at_hand", None)  # the operator's own schedulers have none
    # A worker that has gone is noticed first, and all that follows is its doing.
    if error is None or not path or at_hand is None:
        return
    if getattr(core.model_executor, "is_failed", False):
        return
    with contextlib.suppress(OSError, MemoryError):
        fault = Fault(type(error).__name__, sorted(at_hand()))
        Path(path).write_bytes(msgspec.json.encode(fault))


def read(folder: Path) -> Fault | None:
    """What the engine whose sockets are there has left; None if something else has ended it."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Fault)
    except (OSError, msgspec.DecodeError):
        return None
