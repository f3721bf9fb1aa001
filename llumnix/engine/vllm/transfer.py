"""KV blocks on their way between two workers, in threads beside the model's own work.

A worker has one thread for each direction of each pair of instances, which sends or receives the
blocks of one job after the other and tells the node of each one's end. Blocks are gathered layer by
layer into a bounded staging buffer and leave in chunks; on a GPU that happens on a stream of its
own, behind whatever the model has been given to do when the job began.
"""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from llumnix.engine.vllm.group import TransferGroup

STAGING_BYTES = 16 * 2**20  # of one chunk
IDLE_SECONDS = 600.0  # after which a thread without jobs ends, and its group with it


class Job(msgspec.Struct, array_like=True):
    """One transfer, as the node orders it from all workers of an instance."""

    id: str
    pair: str  # the two instances; a thread for each
    group: str  # which of the pair's groups: a new one after every failure
    seconds: float  # that the whole may take
    notify: str  # path of the datagram socket that learns of the end
    store: tuple[str, dict[str, Any]]  # the rendezvous: qualified name, keyword arguments
    address: str  # of this machine, for the other worker


class Ended(msgspec.Struct, array_like=True):
    """What a worker tells the node when a job has ended."""

    id: str
    rank: int
    bytes: int
    cpu: float  # seconds of a core that the transfer took
    error: str | None = None


@dataclass(frozen=True)
class _Order:
    job: Job
    sends: bool
    blocks: list[int]
    ready: Any  # CUDA event behind which the blocks' contents are complete, None on a CPU


class KvTensors:
    """A worker's KV cache as blocks: one view for each layer, the block in the first dimension."""

    def __init__(self, tensors: Sequence[torch.Tensor], blocks: int) -> None:
        seen: dict[int, torch.Tensor] = {}
        for tensor in tensors:
            seen.setdefault(tensor.data_ptr(), _by_block(tensor, blocks))
        self.layers = list(seen.values())
        self.device = self.layers[0].device
        self.block_bytes: int = sum(t[0].numel() * t.element_size() for t in self.layers)

    def chunks(self, blocks: list[int]) -> Iterator[torch.Tensor]:
        """The block ids in portions that fit the staging buffer."""
        size = max(STAGING_BYTES // self.block_bytes, 1)
        for start in range(0, len(blocks), size):
            yield torch.tensor(blocks[start : start + size], device=self.device)

    def stage(self, count: int) -> list[torch.Tensor]:
        """Room for so many blocks of every layer, in one piece of memory."""
        sizes = [count * t[0].numel() * t.element_size() for t in self.layers]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        parts = memory.split(sizes)
        return [memory] + [
            part.view(layer.dtype).view(count, *layer.shape[1:])
            for part, layer in zip(parts, self.layers, strict=True)
        ]


def _by_block(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """The same memory with the block in front, whatever the attention backend's layout is."""
    for dimension, size in enumerate(tensor.shape):
        if size == blocks:
            return tensor.movedim(dimension, 0)
        if size % blocks == 0 and size > blocks:  # the kernel's blocks are parts of the manager's
            return tensor.unflatten(dimension, (blocks, size // blocks)).movedim(dimension, 0)
    raise ValueError(f"a KV cache of shape {tuple(tensor.shape)} is not one of {blocks} blocks")


class _Lane(threading.Thread):
    """One direction of one pair of instances: its jobs, one after the other, over one group."""

    def __init__(self, pair: str, rank: int, cache: KvTensors) -> None:
        super().__init__(name=f"transfer {pair}", daemon=True)
        self._pair = pair
        self._rank = rank  # of this worker within its instance: rank i talks to rank i
        self._cache = cache
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._group: TransferGroup | None = None
        self._aborted = False
        self._touching = threading.Lock()  # while blocks are read or written

    def put(self, order: _Order) -> None:
        """Have a job done."""
        self._orders.put(order)

    def abort(self) -> None:
        """End this lane, from another thread: no block is read for sending or written from now."""
        self._aborted = True
        with self._touching:
            self._orders.put(None)
        if (group := self._group) is not None:
            group.abort()

    def run(self) -> None:
        """The thread's main function."""
        torch.set_num_threads(1)
        stream = None
        if self._cache.device.type == "cuda":
            torch.cuda.set_device(self._cache.device)
            stream = torch.cuda.Stream()
        with contextlib.suppress(queue.Empty):
            while not self._aborted:
                order = self._orders.get(timeout=IDLE_SECONDS)
                if order is not None:
                    began = time.thread_time()
                    size, error = self._try(order, stream)
                    self._tell(order, time.thread_time() - began, size, error)
        self._leave()

    def _try(self, order: _Order, stream: Any) -> tuple[int, str | None]:
        try:
            with torch.cuda.stream(stream):  # no stream, on a CPU, is no error
                return self._carry_out(order, stream), None
        except Exception as error:
            self._leave()
            text = " ".join(str(error).split())[:300]
            return 0, f"{type(error).__name__}: {text}"

    def _carry_out(self, order: _Order, stream: Any) -> int:
        job, cache = order.job, self._cache
        group = self._join(job, order.sends)
        if stream is not None and order.ready is not None:
            stream.wait_event(order.ready)
        for ids in cache.chunks(order.blocks):
            memory, *parts = cache.stage(len(ids))
            if order.sends:
                with self._touching_blocks(stream):
                    for layer, part in zip(cache.layers, parts, strict=True):
                        torch.index_select(layer, 0, ids, out=part)
                group.send(memory)
            else:
                group.receive(memory)
                with self._touching_blocks(stream):
                    for layer, part in zip(cache.layers, parts, strict=True):
                        layer.index_copy_(0, ids, part)
        group.end()
        return len(order.blocks) * cache.block_bytes

    @contextlib.contextmanager
    def _touching_blocks(self, stream: Any) -> Iterator[None]:
        """While blocks are read or written: not after an abort, which waits for the end of it."""
        with self._touching:
            if self._aborted:
                raise TimeoutError("the transfer was cut off")
            yield
            if stream is not None:
                stream.synchronize()

    def _join(self, job: Job, sends: bool) -> TransferGroup:
        """The group that the job names, made on first use."""
        if self._group is None or self._group.name != job.group or self._group.aborted:
            self._leave()
            self._group = TransferGroup(
                job.group, f"{self._pair}/{job.group}/{self._rank}", sends, self._cache.device
            )
            self._group.open(job.store, job.address, job.seconds)
        self._group.begin(job.seconds)
        return self._group

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _tell(self, order: _Order, cpu: float, size: int, error: str | None) -> None:
        message = msgspec.msgpack.encode(Ended(order.job.id, self._rank, size, cpu, error))
        with (
            contextlib.suppress(OSError),  # the node is gone, and this process soon too
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
        ):
            channel.sendto(message, order.job.notify)


class TransferExtension:
    """What every worker of an instance can do besides; vLLM mixes it into its worker class."""

    _llumnix_lanes: dict[str, _Lane]

    def llumnix_send(self, blocks: list[int], job: Any) -> None:
        """Begin to send these blocks; returns at once."""
        self._llumnix_order(blocks, job, sends=True)

    def llumnix_receive(self, blocks: list[int], job: Any) -> None:
        """Begin to receive into these blocks; returns at once."""
        self._llumnix_order(blocks, job, sends=False)

    def llumnix_abort(self, pair: str) -> None:
        """Cut off the transfer that is under way between two instances."""
        if (lane := self._llumnix_all().pop(pair, None)) is not None:
            lane.abort()

    def _llumnix_all(self) -> dict[str, _Lane]:
        if not hasattr(self, "_llumnix_lanes"):
            self._llumnix_lanes = {}
        return self._llumnix_lanes

    def _llumnix_order(self, blocks: list[int], job: Any, sends: bool) -> None:
        job = msgspec.convert(job, Job)
        lanes = self._llumnix_all()
        lane = lanes.get(job.pair)
        if lane is None or not lane.is_alive():
            runner: Any = self.model_runner  # type: ignore[attr-defined]
            cache = KvTensors(runner.kv_caches, runner.kv_cache_config.num_blocks)
            lane = lanes[job.pair] = _Lane(job.pair, self.rank, cache)  # type: ignore[attr-defined]
            lane.start()
        ready = None
        if lane._cache.device.type == "cuda":
            ready = torch.cuda.current_stream().record_event()
        lane.put(_Order(job, sends, blocks, ready))
