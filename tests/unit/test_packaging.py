"""What a newcomer stands on: the reference of the options, and the small model's home."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import install, model, options, routes

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_the_routes_is_up_to_date() -> None:
    assert routes.TARGET.read_text() == routes.page(), "run `make docs`"


def test_the_reference_of_the_options_is_up_to_date() -> None:
    assert options.TARGET.read_text() == options.page(), "run `make docs`"


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "exec make test" in script.read_text()


def test_the_model_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model.model_path() == tmp_path / "llumnix" / "models" / model.NAME
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.model_path() == tmp_path / ".cache" / "llumnix" / "models" / model.NAME


def test_a_model_that_is_there_is_not_fetched_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model.model_path().mkdir(parents=True)
    (model.model_path() / "config.json").write_text("{}")
    monkeypatch.setattr(model, "_fetch", lambda folder: pytest.fail("fetched"))
    assert model.ensure_model() == model.model_path()


def test_an_install_is_repeated_only_when_its_key_changes(tmp_path: Path) -> None:
    environment = install.Environment(tmp_path)
    assert not environment.complete("one")
    environment.finish("one")
    assert environment.complete("one")
    assert not environment.complete("two")


def test_a_folder_of_the_users_is_not_made_an_environment(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = subprocess.run(
        [sys.executable, install.__file__, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "choose VENV=" in done.stderr
    assert (tmp_path / "letter.txt").read_text() == "dear"
