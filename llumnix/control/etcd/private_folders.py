"""Folders that no other user of the machine can look into, and short ones for sockets."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from llumnix.control.etcd.errors import EmbeddedEtcdError

LONGEST_SOCKET = 100  # bytes of a socket's path; the kernel takes 107


def private_folder(path: Path) -> Path:
    """The folder, made if there is none, which only this user can enter.

    Raises EmbeddedEtcdError if it is somebody else's: who made it could exchange what is in it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat() if path.is_symlink() else path.stat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise EmbeddedEtcdError(f"{path} is not a folder of this user's own")
        if found.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise EmbeddedEtcdError(f"{path} can't be used: {error.strerror or error}") from None
    return path


def socket_folder(data: Path, name: str) -> Path:
    """Where a socket of that name is for what keeps its data there: beside them, if it may be.

    Where that path is too long for a socket, it is a folder of this user's in the temporary one,
    always the same for the same data.
    """
    if len(os.fsencode(data / name)) <= LONGEST_SOCKET:
        return data
    digest = hashlib.sha256(os.fsencode(data)).hexdigest()[:16]
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return private_folder(Path(base) / f"llumnix-{os.geteuid()}-{digest}")
