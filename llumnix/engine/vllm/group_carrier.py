"""KV blocks by way of a torch.distributed group: gathered into buffers, which travel one by one.

Several buffers are in flight, so that one is filled or emptied while another is on its way.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llumnix.engine.vllm import kv_memory
from llumnix.engine.vllm.carrier import Carrier, Touching
from llumnix.engine.vllm.kv_memory import KvMemory
from llumnix.engine.vllm.transfer_group import TransferGroup

DEPTH = 3  # buffers of one transfer
_SETS = 4  # transfers of a worker at a time


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
        self, kind: str, memory: KvMemory, group: TransferGroup, pool: StagingPool
    ) -> None:
        """`kind`: "host" if the group carries tensors of the machine's memory, not the GPU's."""
        self.kind = kind
        self._memory = memory
        self._group = group
        self._pool = pool
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
