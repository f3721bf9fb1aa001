"""Folders of this user's own: nobody else can have put anything into them, or has made them."""

import contextlib
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "llumnix-"  # of all folders in the temporary one
NAMES = 8  # by which a folder there is known: whoever else has one of them does not have the next


class NotPrivateError(Exception):
    """A folder that is somebody else's, or can't be used; the message is one sentence."""


def is_private(folder: Path, others_may: int = 0) -> bool:
    """Whether it is a folder, no link to one, which only this user can enter.

    `others_may`: what others are allowed all the same, as bits of its mode (0o055: read, enter).
    """
    try:
        status = folder.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return mine and not status.st_mode & 0o077 & ~others_may


def private_folder(path: Path) -> Path:
    """The folder, made if there is none, and closed to others. Raises NotPrivateError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(path, others_may=0o077):
            raise NotPrivateError(f"{path} is not a folder of this user's own")
        if not is_private(path):
            path.chmod(0o700)
    except OSError as error:
        raise NotPrivateError(f"{path} can't be used: {error.strerror or error}") from None
    return path


def known_folder(end: str = "", base: Path | None = None) -> Path | None:
    """A folder that all processes of this user find: `llumnix-<uid><end>`, in `base`.

    In the temporary folder, unless `base` names another, anybody can make a folder of that name:
    then it is the next of a few names, the one that exists already if one does. None if somebody
    else has all of them.
    """
    first = (base or Path(tempfile.gettempdir())) / f"{PREFIX}{os.geteuid()}{end}"
    names = [first, *(first.with_name(f"{first.name}-{n}") for n in range(1, NAMES))]
    for name in names:
        if is_private(name):
            return name
    for name in names:
        with contextlib.suppress(FileExistsError):
            name.mkdir(mode=0o700)
        if is_private(name):
            return name
        logger.warning("%s is not this user's alone, so it is not used", name)
    return None
