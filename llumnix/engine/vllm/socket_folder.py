"""Where a node's sockets lie: a folder of its own, which does not stay when the node is killed.

The folders of all nodes of a user lie side by side in the temporary folder, as the path of a socket
must be short. Each is locked by its node, so one without a lock has lost it: whoever comes next
removes it. A lock ends with its process, whatever ends that.
"""

import contextlib
import fcntl
import logging
import multiprocessing
import os
import shutil
import stat
import tempfile
from multiprocessing import util
from pathlib import Path

from llumnix.engine.vllm import segments

logger = logging.getLogger(__name__)

PREFIX = "llumnix-"
HOMES = 8  # names for the folder of all nodes: whoever else has one of them does not have the next

_folders: dict[int, tuple[Path, int]] = {}  # by process, as a fork has none yet: with its lock


def scratch() -> Path:
    """This process's folder, made and locked on the first call; removed when the process ends."""
    if (found := _folders.get(os.getpid())) is not None:
        return found[0]
    home = _home()
    if home is None:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = _lock(folder)
    else:
        # No other node may sweep between the making of a folder and its lock.
        with contextlib.closing(_Descriptor(home)) as guard:
            fcntl.flock(guard.number, fcntl.LOCK_EX)
            _sweep(home)
            folder = Path(tempfile.mkdtemp(prefix="", dir=home))
            lock = _lock(folder)
    assert lock is not None, "nobody else knows of it"
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


def is_private(folder: Path) -> bool:
    """Whether it is a folder of this user's that nobody else may write."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return mine and not status.st_mode & 0o022


class _Descriptor:
    """An open folder."""

    def __init__(self, folder: Path) -> None:
        self.number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def close(self) -> None:
        os.close(self.number)


def _home() -> Path | None:
    """The folder of all nodes of this user; None if somebody else has all that it may be."""
    names = [f"{PREFIX}{os.getuid()}", *(f"{PREFIX}{os.getuid()}-{n}" for n in range(1, HOMES))]
    for home in (Path(tempfile.gettempdir(), name) for name in names):
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700)
        if is_private(home) and not home.lstat().st_mode & 0o077:
            return home
        logger.warning("%s is not this user's alone, so it is not used", home)
    return None


def _remove(folder: Path) -> None:
    segments.remove_nodes(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _sweep(home: Path) -> None:
    """Remove the folders that no living process owns, and the shared memory that was theirs."""
    for folder in home.iterdir():
        with contextlib.suppress(OSError):
            if (lock := _lock(folder)) is not None:
                _remove(folder)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """The descriptor that holds a folder's lock; None if another process has it."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
