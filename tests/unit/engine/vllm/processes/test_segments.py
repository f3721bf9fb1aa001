"""Shared memory of processes that are killed: real ones, with a real tracker of Python's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llumnix.engine.vllm.processes import segments

pytestmark = pytest.mark.skipif(not segments.PLACE.is_dir(), reason="nobody can list segments here")

# A node, an engine of it with a segment, and the tracker that both have.
NODE = """
import multiprocessing, os, sys
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from llumnix.engine.vllm.processes import segments
from llumnix.engine.vllm.processes.socket_folder import EngineFolder

def engine(pipe):
    segments.name_segments()
    mine = shared_memory.SharedMemory(create=True, size=4096)
    pipe.send(mine.name)
    pipe.recv()

resource_tracker.ensure_running()
folder = EngineFolder()
os.environ[segments.VARIABLE] = segments.prefix(Path(folder.name))
names, children = [], []
for _ in range(2):
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=engine, args=(theirs,))
    child.start()
    names.append(ours.recv())
    children.append(child)
for child in children:
    child.kill()
    child.join()
assert all(Path("/dev/shm", name).exists() for name in names)
if sys.argv[1:] == ["ends"]:
    folder.cleanup()
    assert not any(Path("/dev/shm", name).exists() for name in names)
print(resource_tracker._resource_tracker._pid, *names, flush=True)
if not sys.argv[1:]:
    sys.stdin.read()
"""
NEXT = "from llumnix.engine.vllm.processes.socket_folder import scratch; scratch()"


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}


def test_an_engine_that_has_ended_leaves_none(tmp_path: Path) -> None:
    """And nothing to its node's tracker, which would complain of what it does not find."""
    command = [sys.executable, "-W", "error", "-c", NODE, "ends"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    _, *names = done.stdout.split()
    assert len(set(names)) == 2 and all(name.startswith("llumnix_") for name in names)


def test_the_next_node_removes_those_of_a_dead_one(tmp_path: Path) -> None:
    """When the tracker has been killed as well, as by a container's end."""
    node = subprocess.Popen(
        [sys.executable, "-c", NODE],
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert node.stdout is not None
    tracker, *names = node.stdout.readline().split()
    try:
        subprocess.run([sys.executable, "-c", NEXT], env=environment(tmp_path), check=True)
        assert all((segments.PLACE / name).exists() for name in names), "their node lives"
    finally:
        os.kill(int(tracker), signal.SIGKILL)
        node.kill()
        node.communicate()
    assert all((segments.PLACE / name).exists() for name in names)
    subprocess.run([sys.executable, "-c", NEXT], env=environment(tmp_path), check=True)
    assert not any((segments.PLACE / name).exists() for name in names)
