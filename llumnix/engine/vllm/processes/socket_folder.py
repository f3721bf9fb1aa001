"""Where a node's sockets lie: a folder of its own, which does not stay when the node is killed.

The folders of all nodes of a user lie side by side in the temporary folder, as the path of a socket
must be short. Each is locked by its node, so one without a lock has lost it: whoever comes next
removes it. A lock ends with its process, whatever ends that.
"""

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import tempfile
from multiprocessing import util
from pathlib import Path

from llumnix.engine.vllm.processes import segments
from llumnix.private_folders import PREFIX, is_private, known_folder

TRIES = 8  # to lock a folder that nobody else should know of

_folders: dict[int, tuple[Path, int]] = {}  # by process, as a fork has none yet: with its lock


def scratch() -> Path:
    """This process's folder, made and locked on the first call; removed when the process ends."""
    if (found := _folders.get(os.getpid())) is not None:
        return found[0]
    home = known_folder()
    folder, lock = _beside_others() if home is None else _within(home)
    _folders[os.getpid()] = folder, lock
    # With multiprocessing's own: those run in its children too, where atexit's do not.
    util.Finalize(None, _remove, (folder,), exitpriority=-200)
    return folder


class EngineFolder(tempfile.TemporaryDirectory[str]):
    """A folder in there for one engine, which tells its shared memory, too."""

    def __init__(self) -> None:
        super().__init__(dir=scratch(), prefix="")

    def cleanup(self) -> None:
        """Remove all that is left of the engine, which has ended."""
        segments.remove_engines(Path(self.name))
        super().cleanup()


def hold_sockets() -> None:
    """Have multiprocessing put its sockets there, too, in this process and those that it starts.

    Its own folder would stay in the temporary one when the process is killed.
    """
    # It has no setting for it; the same key is read by all of Python's versions.
    multiprocessing.current_process()._config["tempdir"] = str(scratch())  # type: ignore[attr-defined]


class _Descriptor:
    """An open folder."""

    def __init__(self, folder: Path) -> None:
        self.number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def close(self) -> None:
        os.close(self.number)


def _within(home: Path) -> tuple[Path, int]:
    """A folder of this node's in the one of all nodes, and its lock."""
    # No other node may sweep between the making of a folder and its lock.
    with contextlib.closing(_Descriptor(home)) as guard:
        fcntl.flock(guard.number, fcntl.LOCK_EX)
        for folder in home.iterdir():
            _clear(folder)
        folder = Path(tempfile.mkdtemp(prefix="", dir=home))
        lock = _lock(folder)
    assert lock is not None, "nobody else knows of it"
    return folder, lock


def _beside_others() -> tuple[Path, int]:
    """A folder with a name of its own in the temporary one, and its lock.

    There is none for all nodes, so another one that sweeps may have the lock first.
    """
    beside = f"{PREFIX}{os.geteuid()}-node-"
    for folder in Path(tempfile.gettempdir()).glob(f"{beside}*"):
        if is_private(folder):
            _clear(folder)
    for _ in range(TRIES):
        folder = Path(tempfile.mkdtemp(prefix=beside))
        with contextlib.suppress(OSError):
            if (lock := _lock(folder)) is not None:
                return folder, lock
    raise OSError(f"no folder of {tempfile.gettempdir()} can be locked")


def _remove(folder: Path) -> None:
    segments.remove_nodes(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove the folder if no living process owns it, and the shared memory that was its own."""
    with contextlib.suppress(OSError):
        if (lock := _lock(folder)) is not None:
            try:
                _remove(folder)
            finally:
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """The descriptor that holds a folder's lock; None if another process has it, or has removed it.

    Raises OSError if there is no such folder.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:  # else it was removed between the two
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
