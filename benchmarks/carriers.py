"""How fast KV blocks can go between two processes on GPUs, by each way, without any engine.

    python benchmarks/carriers.py [gather] [memory] [group]

Each process sees its own GPU only, as an engine does. `memory`: CUDA IPC, on one GPU and between
two; `group`: NCCL's send and receive between two GPUs, with what its communicator costs; `gather`:
layer by layer and in one kernel, the blocks of a 7B shape (32 layers, 8 MiB a block).
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
LAYERS, BLOCKS, SHAPE = 32, 851, (32, 16, 256)  # of a 7B model, with the KV cache of an A10
SECONDS = 90.0  # for each measurement


def timed(work: Callable[[], Any], times: int = 10) -> float:
    """Seconds of the device for one run, after a first one."""
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def show(what: str, size: int, seconds: float) -> None:
    """One line: how long so many bytes took."""
    speed = size / seconds / 1e9
    print(f"{what:32} {size / MIB:6.0f} MiB {seconds * 1e6:8.0f} µs {speed:6.0f} GB/s", flush=True)


def gather() -> None:
    """Blocks of all layers into one buffer: a kernel for each layer, and one for all."""
    from llumnix.engine.vllm.kv.block_copy import BlockCopy, addresses
    from llumnix.engine.vllm.kv.kv_memory import KvMemory

    layers = [
        torch.randn(BLOCKS, *SHAPE, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)
    ]
    memory = KvMemory(layers, BLOCKS)
    other = KvMemory([torch.empty_like(layer) for layer in layers], BLOCKS)
    assert memory.pieces is not None and other.pieces is not None
    sides = [
        addresses(m.pieces or (), [t.untyped_storage().data_ptr() for t in m.layers])
        for m in (memory, other)
    ]
    copy = BlockCopy(sides[0], sides[1], memory.device)
    for count in (1, 4, 16, 64):
        ids = torch.randperm(BLOCKS, device="cuda")[:count]
        staging = torch.empty(count * memory.block_bytes, dtype=torch.uint8, device="cuda")
        size, listed = count * memory.block_bytes, ids.tolist()
        show("layer by layer", size, timed(lambda i=ids, s=staging: memory.gather(i, s)))
        show("one kernel", size, timed(lambda i=listed: copy(i, i)))


def memory(rank: int, store: Any) -> None:
    """One process reads another's memory."""
    if rank == 0:
        tensor = torch.arange(256 * MIB // 8, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        store.set("handle", pickle.dumps(tensor.untyped_storage()._share_cuda_()))
        store.wait(["done"], timedelta(seconds=SECONDS))
        return
    handle = pickle.loads(store.get("handle"))
    began = time.perf_counter()
    storage = torch.UntypedStorage._new_shared_cuda(0, *handle[1:])
    print(f"mapped after {(time.perf_counter() - began) * 1e3:.1f} ms")
    theirs = torch.empty(0, dtype=torch.int64, device="cuda").set_(storage)
    mine = torch.empty_like(theirs)
    for size in (1, 8, 32, 256):
        words = size * MIB // 8
        show("read", size * MIB, timed(lambda n=words: mine[:n].copy_(theirs[:n])))
    assert bool((mine == theirs).all())
    store.set("done", b"1")


def group(rank: int, store: Any) -> None:
    """NCCL between two processes, and what its communicators take."""
    from torch.distributed import PrefixStore, ProcessGroupNCCL

    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    for name in ("first", "second"):
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=20)
        free, began = torch.cuda.mem_get_info()[0], time.perf_counter()
        made = ProcessGroupNCCL(PrefixStore(name, store), rank, 2, options)
        one = torch.zeros(1024, device="cuda")
        (made.send([one], 1, 0) if rank == 0 else made.recv([one], 0, 0)).wait()
        torch.cuda.synchronize()
        took, used = time.perf_counter() - began, free - torch.cuda.mem_get_info()[0]
        print(f"{name} communicator: {took * 1e3:.0f} ms, {used / MIB:.0f} MiB", flush=True)
    buffer = torch.zeros(256 * MIB, dtype=torch.uint8, device="cuda")

    def go(part: torch.Tensor) -> None:
        (made.send([part], 1, 0) if rank == 0 else made.recv([part], 0, 0)).wait()

    for size in (1, 8, 32, 64, 256):
        show("send and receive", size * MIB, timed(lambda n=size: go(buffer[: n * MIB]), 20))


def two(what: str, first: int, second: int) -> None:
    """Two processes, each on a GPU of its own number; what the receiver says."""
    with tempfile.TemporaryDirectory() as folder:
        both = []
        for rank, device in enumerate((first, second)):
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(device)}
            command = [sys.executable, __file__, what, str(rank), folder]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            both.append(subprocess.Popen(command, env=environment, text=True, **pipes))  # type: ignore[call-overload]
        try:
            print(f"{what}, GPU {first} to GPU {second}")
            print(both[1].communicate(timeout=SECONDS)[0])
        except subprocess.TimeoutExpired:
            print("not done in time")
        finally:
            for process in both:
                process.kill()
                process.wait()


def main() -> None:
    """Measure all that this machine has GPUs for."""
    if len(sys.argv) == 4:
        store = torch.distributed.FileStore(f"{sys.argv[3]}/store", 2)
        torch.cuda.set_device(0)
        {"memory": memory, "group": group}[sys.argv[1]](int(sys.argv[2]), store)
        return
    devices = torch.cuda.device_count()
    if not devices:
        sys.exit("there is no GPU here")
    wanted = sys.argv[1:] or ["gather", "memory", "group"]
    if "gather" in wanted:
        gather()
    if "memory" in wanted:
        two("memory", 0, 0)
    if "memory" in wanted and devices > 1:
        two("memory", 0, 1)
    if "group" in wanted and devices > 1:
        two("group", 0, 1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
