"""What the deaths of engines leave in their node: nothing.

    python -m tests.kit.deaths --engines 50
    python -m tests.kit.deaths --nodes 50

An engine core over a modelled device is started, killed or stopped, found dead or hanging, and
cleared away, again and again, in a process that is no node but its engines' owner. Or a node is
killed beside one that goes on, and started again. Prints what there is before and after.
"""

import argparse
import asyncio
import contextlib
import gc
import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import shared_memory, util
from pathlib import Path
from typing import Any, NamedTuple

from llumnix.engine.base import Death, EngineEvents
from llumnix.engine.sim.executor import ModelledExecutor
from llumnix.engine.vllm.instance import VllmEngine
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from llumnix.engine.vllm.processes.launcher import Placement
from llumnix.engine.vllm.processes.watchdog import Patience
from tests.kit.etcd import EtcdCluster
from tests.kit.node import Node, Nodes, descendants
from tests.kit.wait import eventually

SEGMENT_SIZE = "LLUMNIX_TEST_SEGMENT"  # in bytes: nobody else's have the same
DEADLINE = 120.0  # seconds for a start, on a busy machine
HANG = 0.5  # seconds
LEASE = ("--lease-ttl", "2")  # which has to end before the next death
FATAL = (signal.SIGSTOP, signal.SIGKILL)  # the one that leaves more goes first


class Count(NamedTuple):
    """What can grow."""

    descriptors: int
    threads: int
    tasks: int
    children: int
    files: int  # and folders, in the temporary one
    segments: int  # of shared memory

    @classmethod
    def here(cls) -> "Count":
        """Of this process."""
        gc.collect()
        # There are as many of asyncio's as have been needed at a time, up to a limit.
        pool = [t for t in threading.enumerate() if t.name.startswith("asyncio_")]
        threads = len(os.listdir("/proc/self/task")) - len(pool)
        descriptors = len(os.listdir("/proc/self/fd"))
        tasks = len(asyncio.all_tasks())
        files = sum(1 for _ in Path(tempfile.gettempdir()).rglob("*"))
        children = len(descendants(os.getpid()))
        return cls(descriptors, threads, tasks, children, files, _segments())

    @classmethod
    def of(cls, node: Node, folder: Path) -> "Count":
        """Of a node whose temporary folder this is."""
        entries = sum(1 for _ in folder.rglob("*"))
        children = len(descendants(node.pid))
        return cls(node.descriptors(), node.threads(), 0, children, entries, _segments())


class SharingExecutor(ModelledExecutor):
    """A modelled device with shared memory, as vLLM's message queues have it."""

    def _init_executor(self) -> None:
        super()._init_executor()
        size = int(os.environ[SEGMENT_SIZE])
        self._segment = shared_memory.SharedMemory(create=True, size=size)


def _segments() -> int:
    """Those of the engines here, or that have been: others may have some, of other sizes."""
    size, found = int(os.environ.get(SEGMENT_SIZE, "-1")), 0
    for entry in os.scandir("/dev/shm"):
        with contextlib.suppress(FileNotFoundError):
            found += entry.stat().st_size == size
    return found


def engine_config(model: str, device: str = "tests.kit.deaths.SharingExecutor") -> Any:
    """An engine core over a modelled device."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        distributed_executor_backend=device,
        num_gpu_blocks_override=100,
        max_model_len=512,
    ).create_engine_config()


async def engine_dies(config: Any, folder: Path, fatal: signal.Signals) -> str:
    """Start an engine, end it, and clear it away; what it is said to have died of."""
    died: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
    nowhere = Rendezvous("", {}, "")
    patience = Patience(start=DEADLINE, hang=HANG)
    engine = VllmEngine("a-0", config, Placement(), folder / "a-0.log", patience, nowhere)
    try:
        await engine.start(EngineEvents(lambda outputs: None, died.set_result))
        assert engine.pid is not None
        os.kill(engine.pid, fatal)
        return (await asyncio.wait_for(died, DEADLINE)).reason
    finally:
        await engine.stop(0.0)


async def engines_die(
    model: str, folder: Path, deaths: int, tell: Callable[[str], None] = lambda line: None
) -> tuple[Count, Count]:
    """What there is after the first deaths, one of each kind, and after so many more."""
    os.environ[SEGMENT_SIZE] = str(32_768 + os.getpid())
    config = engine_config(model)
    for fatal in FATAL:
        await engine_dies(config, folder, fatal)
    before = Count.here()
    tell(f"before: {before}")
    for number, fatal in zip(range(deaths), itertools.cycle(FATAL), strict=False):
        tell(f"{number + 1}: {await engine_dies(config, folder, fatal)}: {Count.here()}")
    return before, Count.here()


def nodes_die(
    model: str, folder: Path, deaths: int, tell: Callable[[str], None] = lambda line: None
) -> tuple[Count, Count]:
    """What a node has after the first death of another, and after so many more.

    The other one has requests of the first one's clients each time.
    """
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary)}
    with EtcdCluster(1) as etcd:
        nodes = Nodes(folder, etcd.endpoints, "deaths", model)
        try:
            near = nodes.start("near", *LEASE, environment=environment)
            near.ready(DEADLINE)
            port: int | None = None
            counts: list[Count] = []
            for number in range(deaths + 1):
                far = nodes.start("far", *LEASE, port=port, environment=environment)
                port = far.port
                eventually(lambda: near.instances() == ["far-0", "near-0"], within=DEADLINE)
                body = {"model": "small", "prompt": "x", "max_tokens": 500}
                with near.stream("/v1/completions", body) as stream:
                    next(iter(stream))
                    far.kill()
                    stream.text()
                eventually(lambda: near.instances() == ["near-0"], within=DEADLINE)
                eventually(near.idle)
                counts.append(Count.of(near, temporary))
                tell(f"{number}: {counts[-1]}")
            return counts[0], counts[-1]
        finally:
            nodes.close()


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Run one or the other; exit status 1 if anything has grown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=0)
    args = parser.parse_args()
    model = os.environ.get("LLUMNIX_TEST_MODEL") or str(
        Path.home() / ".cache/llumnix/models/SmolLM2-135M-Instruct"
    )
    grown = False
    folder = Path(tempfile.mkdtemp())
    # After all that multiprocessing has there.
    util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-300)
    # Nobody else's files are counted.
    os.environ["TMPDIR"] = tempfile.tempdir = f"{folder}/t"
    os.mkdir(tempfile.tempdir)
    if args.engines:
        before, after = asyncio.run(engines_die(model, folder, args.engines, _say))
        grown |= any(b > a for a, b in zip(before, after, strict=True))
    if args.nodes:
        before, after = nodes_die(model, folder, args.nodes, _say)
        grown |= any(b > a for a, b in zip(before, after, strict=True))
    print("something has grown" if grown else "nothing has grown")
    return grown


if __name__ == "__main__":
    sys.exit(main())
