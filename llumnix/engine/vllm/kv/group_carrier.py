"""KV blocks by way of a torch.distributed group: gathered into buffers, which travel one by one.

Several buffers are in flight, so that one is filled or emptied while another is on its way.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo

from llumnix.engine.vllm.kv import kv_memory
from llumnix.engine.vllm.kv.carrier import RECEIVER, SENDER, Carrier, Touching
from llumnix.engine.vllm.kv.kv_memory import KvMemory

POLL = 0.0002  # seconds between looks at what a GPU has under way
_UNUSED_TAG = 999
DEPTH = 3  # buffers of one transfer
_SETS = 4  # transfers of a worker at a time


class TransferGroup:
    """A torch.distributed process group of two ranks; used by one thread, aborted from any.

    Gloo carries tensors on CPUs, NCCL those on GPUs. Each operation has a deadline; a group that
    has failed or was aborted is thrown away and made anew.
    """

    def __init__(self, sends: bool, device: torch.device) -> None:
        """`device`: whose tensors it carries, of a GPU or the CPU."""
        self.aborted = False
        self._rank = SENDER if sends else RECEIVER
        self._cuda: bool = device.type == "cuda"
        self._device = device
        self._group: Any = None
        self._deadline = 0.0
        self._lock = threading.Lock()

    @property
    def keeps_store(self) -> bool:
        """Whether it uses the store in which it was opened as long as it lives, as NCCL does."""
        return self._cuda

    def open(self, store: Any, address: str, seconds: float) -> None:
        """Meet the other worker through the store, within so many seconds. Raises RuntimeError.

        `address` is that of this machine, at which the other worker can reach it.
        """
        within = timedelta(seconds=seconds)
        if self._cuda:
            self._group = _nccl(PrefixStore("g", store), self._rank, within)
        else:
            self._group = _gloo(store, self._rank, address, within)
        # NCCL connects with the first operation, and it is to be known here whether it can. And
        # when something has come through both ways, neither needs the store for this any more.
        self.begin(time.monotonic() + seconds)
        first = torch.zeros(1, device=self._device)
        peer = 1 - self._rank
        ways = [
            lambda: self._group.send([first], peer, 0),
            lambda: self._group.recv([first], peer, 0),
        ]
        for way in ways if self._rank == SENDER else reversed(ways):
            self.wait(way())
        self.settle()

    def begin(self, deadline: float) -> None:
        """Work begins that must end at `deadline` (monotonic)."""
        self._deadline = deadline

    def send(self, tensor: torch.Tensor) -> Any:
        """Begin to send a tensor to the receiver."""
        return self._group.send([tensor], RECEIVER, 0)

    def receive(self, tensor: torch.Tensor) -> Any:
        """Begin to receive a tensor from the sender."""
        return self._group.recv([tensor], SENDER, 0)

    def wait(self, work: Any) -> None:
        """Wait for what was begun; on a GPU only what is put on the current stream later waits."""
        left = self._deadline - time.monotonic()
        if left <= 0 or self.aborted:
            raise TimeoutError("the transfer's time is over")
        if self._cuda:
            work.wait()
        else:
            work.wait(timedelta(seconds=left))
        if self.aborted:
            raise TimeoutError("the transfer was cut off")

    def settle(self) -> None:
        """Wait until the current stream has done what it was given. Raises TimeoutError."""
        if not self._cuda:
            return
        end = torch.cuda.current_stream().record_event()
        while not end.query():
            if time.monotonic() > self._deadline or self.aborted:
                raise TimeoutError("the transfer's time is over")
            time.sleep(POLL)
        if self.aborted:
            raise TimeoutError("the transfer was cut off")

    def abort(self) -> None:
        """Cut off a pending operation, from another thread."""
        self.aborted = True
        with self._lock:
            if self._group is None:
                return
            if self._cuda:
                self._group.abort()
            else:
                _poison(self._group, 1 - self._rank)

    def close(self) -> None:
        """Give up the group."""
        self.abort()
        with self._lock:
            self._group = None


def _gloo(store: Any, rank: int, address: str, within: timedelta) -> Any:
    options = ProcessGroupGloo._Options()
    options._timeout = within
    # Without it Gloo publishes what the host's name resolves to, which may be the loopback.
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    return ProcessGroupGloo(store, rank, 2, options)


def _poison(group: Any, peer: int) -> None:
    """End all that is pending on a Gloo group: its own abort does nothing, a timeout does."""
    with contextlib.suppress(RuntimeError):
        group.recv([torch.zeros(1)], peer, _UNUSED_TAG).wait(timedelta(milliseconds=1))


def _nccl(store: Any, rank: int, within: timedelta) -> Any:
    from torch.distributed import ProcessGroupNCCL

    # vLLM's own groups are watched by NCCL's monitor; these are by their deadlines.
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    options = ProcessGroupNCCL.Options()
    options._timeout = within
    return ProcessGroupNCCL(store, rank, 2, options)


class StagingPool:
    """The buffers of one worker, made when they are first needed and kept."""

    def __init__(self) -> None:
        self._free: list[list[torch.Tensor]] = []
        self._places = threading.Semaphore(_SETS)

    @contextmanager
    def buffers(
        self, size: int, device: torch.device, deadline: float
    ) -> Iterator[list[torch.Tensor]]:
        """`DEPTH` buffers of so many bytes. Raises TimeoutError while all are in use."""
        if not self._places.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            raise TimeoutError("all buffers are in use by other transfers")
        try:
            held = self._free.pop() if self._free else []
            if not held or held[0].numel() < size or held[0].device != device:
                held = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(DEPTH)]
            yield held
            self._free.append(held)  # not after a failure, as something may still write there
        finally:
            self._places.release()


class Staged(Carrier):
    """Sends and receives through a group."""

    def __init__(
        self,
        kind: str,
        memory: KvMemory,
        group: TransferGroup,
        pool: StagingPool,
        store: Any = None,
    ) -> None:
        """`kind`: "host" if the group carries tensors of the machine's memory, not the GPU's.
        `store`: of a group that uses it as long as it lives."""
        self.kind = kind
        self._memory = memory
        self._group = group
        self._pool = pool
        self._store = store
        self._by_host = kind == "host" and memory.device.type == "cuda"
        size = max(kv_memory.STAGING_BYTES // memory.block_bytes, 1)
        self._bytes = size * memory.block_bytes
        if memory.device.type == "cuda":
            # CUDA loads a kernel when it first runs, for up to 0.1 s; not while a request waits.
            # Nothing reads block 0, which is vLLM's null block.
            buffer = torch.empty(memory.block_bytes, dtype=torch.uint8, device=memory.device)
            for ids in memory.chunks([0]):
                memory.scatter(ids, memory.gather(ids, buffer))
            torch.cuda.current_stream().synchronize()

    def send(self, blocks: list[int], deadline: float, touching: Touching) -> None:
        """Gather and send, chunk by chunk."""
        memory, under_way = self._memory, deque[Any]()
        self._group.begin(deadline)
        with self._pool.buffers(self._bytes, memory.device, deadline) as buffers:
            for number, ids in enumerate(memory.chunks(blocks)):
                if len(under_way) == DEPTH:
                    self._group.wait(under_way.popleft())
                with touching():
                    full = memory.gather(ids, buffers[number % DEPTH])
                    if self._by_host:
                        full = full.cpu()
                under_way.append(self._group.send(full))
            while under_way:
                self._group.wait(under_way.popleft())
            self._group.settle()

    def receive(self, blocks: list[int], deadline: float, touching: Touching) -> None:
        """Receive and scatter, chunk by chunk."""
        memory, under_way = self._memory, deque[tuple[Any, torch.Tensor, torch.Tensor]]()
        self._group.begin(deadline)

        def empty_one() -> None:
            work, ids, full = under_way.popleft()
            self._group.wait(work)
            with touching():
                memory.scatter(ids, full.to(memory.device) if self._by_host else full)

        with self._pool.buffers(self._bytes, memory.device, deadline) as buffers:
            for number, ids in enumerate(memory.chunks(blocks)):
                if len(under_way) == DEPTH:
                    empty_one()
                room = buffers[number % DEPTH][: len(ids) * memory.block_bytes]
                if self._by_host:
                    room = torch.empty_like(room, device="cpu")
                under_way.append((self._group.receive(room), ids, room))
            while under_way:
                empty_one()
            self._group.settle()

    def abort(self) -> None:
        """Cut off the group."""
        self.aborted = True
        self._group.abort()

    def close(self) -> None:
        """Give up the group."""
        self.aborted = True
        self._group.close()
        if self._store is not None:
            self._store.close()
