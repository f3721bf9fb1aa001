"""Shared memory of an engine's processes, which stays when they are killed, unless it is removed.

vLLM's messages between an engine core and its workers go through segments of it. Python names them
at random, and a process that is killed leaves its own to a tracker that lives as long as the node.
So each has a name that tells whose it was: its node's folder, and its engine's in there.
"""

import contextlib
import os
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

VARIABLE = "LLUMNIX_SEGMENTS"  # what the names of a process's segments are to begin with
PLACE = Path("/dev/shm")  # where Linux shows them; elsewhere nobody can list them
_RANDOM = 8  # characters of a name behind that


def prefix(folder: Path) -> str:
    """What the names of an engine's segments begin with; `folder` is its own, within its node's."""
    return f"{_of_node(folder.parent)}{folder.name}_"


def name_segments() -> None:
    """Have this process give its segments such names, if it is to.

    Python has no setting for it: a version that makes names otherwise goes on to do so.
    """
    start = os.environ.get(VARIABLE)
    module: Any = shared_memory
    known = hasattr(module, "_SHM_NAME_PREFIX") and hasattr(module, "_SHM_SAFE_NAME_LENGTH")
    if start and known and PLACE.is_dir():
        module._SHM_NAME_PREFIX = f"/{start}"
        module._SHM_SAFE_NAME_LENGTH = len(start) + 1 + _RANDOM


def remove_engines(folder: Path) -> None:
    """Remove what is left of an engine's, which has ended."""
    for segment in _found(prefix(folder)):
        # It was the tracker's to remove, of which all processes of a node have the same.
        resource_tracker.unregister(f"/{segment}", "shared_memory")


def remove_nodes(folder: Path) -> None:
    """Remove what is left of a node's whose folder this was."""
    _found(_of_node(folder))


def _of_node(folder: Path) -> str:
    return f"llumnix_{folder.name}_"


def _found(start: str) -> list[str]:
    """The names of the segments that begin so, which are no more."""
    gone = []
    with contextlib.suppress(OSError):
        for name in os.listdir(PLACE):
            if name.startswith(start):
                with contextlib.suppress(OSError):  # somebody else's, or removed meanwhile
                    (PLACE / name).unlink()
                    gone.append(name)
    return gone
