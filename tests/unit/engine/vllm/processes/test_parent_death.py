"""Nothing of a node outlives it, and nothing of it stays: real processes are killed."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llumnix.private_folders import NAMES
from tests.kit.node import alive, descendants
from tests.kit.wait import eventually

SCRATCH = """
import sys, threading
from llumnix.engine.vllm.processes.socket_folder import scratch
print(scratch(), flush=True)
sys.stdin.read()
"""

CHILD = """
import os, tempfile
from llumnix.engine.vllm.processes import launcher
launcher._PRELOAD = []
with launcher.start_fork_server().Pool(1) as pool:
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    print(pool.apply(tempfile.gettempdir), pool.apply(cache_dir), flush=True)
print(tempfile.gettempdir(), cache_dir())
"""


@contextlib.contextmanager
def running(folder: Path, *command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python process with a temporary folder of its own, and the first line that it says."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ
        | {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
        | {"LATE_SIGN": str(folder / "importing")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        for pid in {process.pid, *descendants(process.pid)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("stopped", ["nobody", "engine core", "worker", "importing"])
def test_all_end_with_a_node_that_is_killed(tmp_path: Path, stopped: str) -> None:
    """Also one that is stopped, and a fork server that has not imported everything yet."""
    options = ["--import-slowly"] if stopped == "importing" else []
    with running(tmp_path, "-m", "tests.kit.family", *options) as (node, said):
        family = descendants(node.pid)
        if stopped == "importing":
            assert len(family) == 2, "the fork server, and the resource tracker"
            eventually((tmp_path / "importing").exists)
        else:
            engine, worker = json.loads(said)
            assert {engine, worker} < family and len(family) == 4
            if stopped != "nobody":
                os.kill(engine if stopped == "engine core" else worker, signal.SIGSTOP)
        node.kill()
        node.wait()
        eventually(lambda: not alive(family), within=1.0)


def test_the_folder_of_a_killed_node_goes_with_the_next_start(tmp_path: Path) -> None:
    with (
        running(tmp_path, "-c", SCRATCH) as (_, living),
        running(tmp_path, "-c", SCRATCH) as (killed, dead),
    ):
        for folder in living, dead:
            assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
        killed.kill()
        killed.wait()
        Path(dead, "socket").touch()
        with running(tmp_path, "-c", SCRATCH) as (ends, mine):
            assert not Path(dead).exists() and Path(living).is_dir()
            ends.communicate("end\n")
            assert not Path(mine).exists(), "one that ends by itself leaves nothing"


def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path) -> None:
    home = tmp_path / f"llumnix-{os.getuid()}"
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    (tmp_path / f"{home.name}-1").symlink_to(home)
    (tmp_path / f"{home.name}-2").write_text("somebody's")
    for _ in range(2):
        with running(tmp_path, "-c", SCRATCH) as (_, folder):
            assert Path(folder).parent == tmp_path / f"{home.name}-3"
            assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
            assert [folder] == [str(path) for path in Path(folder).parent.iterdir()], "swept too"
    assert not list(home.iterdir())


def test_where_somebody_has_all_names_it_is_one_that_nobody_knows(tmp_path: Path) -> None:
    for end in ("", *(f"-{n}" for n in range(1, NAMES))):
        (tmp_path / f"llumnix-{os.getuid()}{end}").touch()
    with (
        running(tmp_path, "-c", SCRATCH) as (_, living),
        running(tmp_path, "-c", SCRATCH) as (killed, dead),
    ):
        for folder in living, dead:
            assert Path(folder).parent == tmp_path and Path(folder).is_dir()
            assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
        killed.kill()
        killed.wait()
        with running(tmp_path, "-c", SCRATCH):
            assert not Path(dead).exists() and Path(living).is_dir()


def test_the_sockets_of_multiprocessing_lie_there_too(tmp_path: Path) -> None:
    with running(tmp_path, "-m", "tests.kit.family") as (_, said):
        assert json.loads(said)
        (own,) = (tmp_path / f"llumnix-{os.getuid()}").iterdir()
        assert [path.name.partition("-")[0] for path in own.iterdir()] == ["listener"]
        assert {path.name for path in tmp_path.iterdir()} == {own.parent.name, "importing"}


def test_nothing_of_an_engine_is_where_somebody_else_can_have_put_it(tmp_path: Path) -> None:
    """PyTorch loads code from a name in the temporary folder that anybody can guess."""
    caches = tmp_path / "caches"
    environment = os.environ | {"TMPDIR": str(tmp_path), "VLLM_CACHE_ROOT": str(caches)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-c", CHILD]

    def places() -> list[Path]:
        said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return [Path(os.fsdecode(word)) for word in said.stdout.split()]

    child, compiled, node, same = places()
    assert child.parent == tmp_path / f"llumnix-{os.getuid()}"
    assert compiled == same == caches / "torchinductor"
    assert node == tmp_path, "where an embedded etcd's sockets may have to be found"

    compiled.chmod(0o777)
    child, compiled, _, same = places()
    assert compiled.parent == same.parent == child, "what others may write is not used"
