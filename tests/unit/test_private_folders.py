"""Folders of this user's own: what is taken for one, and what is made."""

import os
import stat
from pathlib import Path

import pytest

from llumnix.private_folders import (
    NAMES,
    NotPrivateError,
    is_private,
    known_folder,
    private_folder,
)


def test_a_folder_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who made it could put another socket into it."""
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(NotPrivateError):
            private_folder(tmp_path / name)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(NotPrivateError, match="not a folder of this user's own"):
        private_folder(tmp_path)
    assert not is_private(tmp_path)


def test_a_folder_is_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    assert not is_private(folder) and is_private(folder, others_may=0o055)
    private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and is_private(folder)


def test_whoever_has_one_name_does_not_have_the_next(tmp_path: Path) -> None:
    first = tmp_path / f"llumnix-{os.getuid()}-x"
    first.touch()
    taken = [first]
    for number in range(1, NAMES):
        folder = known_folder("-x", tmp_path)
        assert folder == first.with_name(f"{first.name}-{number}")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        taken[-1].unlink()
        assert known_folder("-x", tmp_path) == folder, "the one that exists, of all names"
        taken[-1].touch()
        folder.rmdir()
        folder.touch()
        taken.append(folder)
    assert known_folder("-x", tmp_path) is None
