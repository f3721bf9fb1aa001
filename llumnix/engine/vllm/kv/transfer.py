"""KV blocks on their way between two workers, in threads beside the model's own work.

A worker has one thread for each direction of each pair of instances, which sends or receives the
blocks of one job after the other and tells the node of each one's end. How the blocks go is the
carrier's matter (`carrier`); on a GPU they go on a stream of their own, behind whatever the model
has been given to do when the job began.
"""

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from vllm.utils.import_utils import resolve_obj_by_qualname

from llumnix.engine.vllm.kv.carrier import (
    LADDER,
    RECEIVER,
    SENDER,
    Carrier,
    SetupError,
    exchange,
    identify,
    ways,
)
from llumnix.engine.vllm.kv.group_carrier import Staged, StagingPool, TransferGroup
from llumnix.engine.vllm.kv.kv_memory import KvMemory
from llumnix.engine.vllm.kv.memory_carrier import MemoryOffer, Reader
from llumnix.engine.vllm.kv.peer_memory import NotReadable

logger = logging.getLogger(__name__)

MEET_SECONDS = 3.0  # to make a carrier; a Gloo listener whose peer dies then waits five times that
IDLE_SECONDS = 600.0  # after which a thread without jobs ends, and its carrier with it
# Between looks whether the other worker lives: a GPU's memory that is mapped here stays taken.
LOOK_SECONDS = 2.0


class Job(msgspec.Struct, array_like=True):
    """One transfer, as the node orders it from all workers of an instance."""

    id: str
    pair: str  # the two instances; a thread for each
    group: str  # which of the pair's carriers: a new one after every failure
    seconds: float  # that the whole may take
    notify: str  # path of the datagram socket that learns of the end
    store: tuple[str, dict[str, Any]]  # the rendezvous: qualified name, keyword arguments
    address: str  # of this machine, for the other worker
    # The ways for blocks that may be taken.
    ladder: list[str] = msgspec.field(default_factory=lambda: list(LADDER))


class TransferEnd(msgspec.Struct, array_like=True):
    """What a worker tells the node when a job has ended."""

    id: str
    rank: int
    bytes: int
    cpu: float  # seconds of a core that the transfer took
    error: str | None = None
    setup: bool = False  # whether it failed before the two workers had a way for blocks
    kind: str = ""  # of the carrier


@dataclass(frozen=True)
class _Order:
    job: Job
    sends: bool
    blocks: list[int]  # none: only make the carrier
    ready: Any  # CUDA event behind which the blocks' contents are complete, None on a CPU


class _TransferLane(threading.Thread):
    """One direction of one pair of instances: its jobs, one after the other, over one carrier."""

    def __init__(self, pair: str, rank: int, memory: KvMemory, pool: StagingPool) -> None:
        super().__init__(name=f"transfer {pair}", daemon=True)
        self._pair = pair
        self._rank = rank  # of this worker within its instance: rank i talks to rank i
        self.memory = memory
        self._pool = pool
        self.orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self.carrier: Carrier | None = None
        self.name_of_carrier = ""
        self._stream: Any = None
        self._aborted = False
        self._touching = threading.Lock()  # while blocks are read or written

    def abort(self) -> None:
        """End this lane, from another thread: no block is read for sending or written from now."""
        self._aborted = True
        with self._touching:
            self.orders.put(None)
        if (carrier := self.carrier) is not None:
            carrier.abort()
        if (stream := self._stream) is not None:
            stream.synchronize()  # what it was given may write blocks yet; all of it ends soon

    def run(self) -> None:
        """The thread's main function."""
        torch.set_num_threads(1)
        if self.memory.device.type == "cuda":
            torch.cuda.set_device(self.memory.device)
            self._stream = torch.cuda.Stream()
        idle = 0.0
        while not self._aborted and idle < IDLE_SECONDS:
            try:
                order = self.orders.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                idle += LOOK_SECONDS
                if self.carrier is not None and self.carrier.gone:
                    self._leave()
                continue
            idle = 0.0
            if order is not None:
                self._carry_out(order)
        self._leave()

    def _carry_out(self, order: _Order) -> None:
        began, size, error, setup = time.thread_time(), 0, None, False
        try:
            with torch.cuda.stream(self._stream):  # no stream, on a CPU, is no error
                deadline = time.monotonic() + order.job.seconds
                carrier = self._join(order.job, order.sends, deadline)
                if order.blocks:
                    self._pass(carrier, order, deadline)
                    size = len(order.blocks) * self.memory.block_bytes
        except Exception as failure:
            self._leave()
            setup = isinstance(failure, SetupError)
            text = " ".join(str(failure).split())[:300]
            error = f"{type(failure).__name__}: {text}"
        kind = self.carrier.kind if self.carrier is not None else ""
        cpu = time.thread_time() - began
        self._tell(order, TransferEnd(order.job.id, self._rank, size, cpu, error, setup, kind))

    def _pass(self, carrier: Carrier, order: _Order, deadline: float) -> None:
        if order.ready is not None:
            if order.sends:
                order.ready.synchronize()  # another process may read them from then on
            else:
                self._stream.wait_event(order.ready)
        if not all(0 <= block < self.memory.blocks for block in order.blocks):
            raise IndexError("index out of range: there is no such KV block")
        (carrier.send if order.sends else carrier.receive)(order.blocks, deadline, self._touch)

    @contextlib.contextmanager
    def _touch(self) -> Iterator[None]:
        """While blocks are read or written: not after an abort, which waits for the end of it."""
        with self._touching:
            if self._aborted:
                raise TimeoutError("the transfer was cut off")
            yield

    def _join(self, job: Job, sends: bool, deadline: float) -> Carrier:
        """The carrier that the job names, made on first use. Raises SetupError, Absent."""
        carrier = self.carrier
        if carrier is None or self.name_of_carrier != job.group or carrier.aborted:
            self._leave()
            try:
                carrier = self._make(job, sends, deadline)
            except (RuntimeError, OSError) as error:
                raise SetupError(str(error)) from error
            self.name_of_carrier = job.group  # first: nobody may take it for another one
            self.carrier = carrier
            if self._aborted:
                carrier.abort()
        return carrier

    def _make(self, job: Job, sends: bool, deadline: float) -> Carrier:
        """Meet the other worker, and make what both can use."""
        seconds = min(deadline - time.monotonic(), MEET_SECONDS)
        factory, options = job.store
        prefix = f"{options['prefix']}{self._pair}/{job.group}/{self._rank}/"
        store: Any = resolve_obj_by_qualname(factory)(
            **(options | {"prefix": prefix, "timeout": seconds})
        )
        kept, offer = False, None
        try:
            me = identify(self.memory, job.ladder)
            offer = MemoryOffer(self.memory, job.address, me) if sends else None
            rank = SENDER if sends else RECEIVER
            other = exchange(store, rank, me, seconds)
            kinds = ways(me, other, rank)
            until = time.monotonic() + seconds
            if kinds[:1] == ["memory"]:
                try:
                    return offer.accept(until) if offer else Reader(self.memory, other, until)
                except NotReadable as error:  # which both know then
                    logger.info("%s: %s", self._pair, error)
                kinds = kinds[1:]
            if not kinds:
                raise SetupError("the two workers have no way for KV blocks in common")
            kind = kinds[0]
            device = torch.device("cpu") if kind == "host" else self.memory.device
            group = TransferGroup(sends, device)
            group.open(store, job.address, seconds)
            its_store = store if group.keeps_store else None
            carrier = Staged(kind, self.memory, group, self._pool, its_store)
            kept = group.keeps_store
            return carrier
        finally:
            if offer is not None:
                offer.close()
            if not kept:  # both have met, or never will: no keys are left behind
                store.close()

    def _leave(self) -> None:
        carrier, self.carrier = self.carrier, None
        if carrier is not None:
            carrier.close()

    def _tell(self, order: _Order, ended: TransferEnd) -> None:
        with (
            contextlib.suppress(OSError),  # the node is gone, and this process soon too
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
        ):
            channel.sendto(msgspec.msgpack.encode(ended), order.job.notify)


class TransferExtension:
    """What every worker of an instance can do besides; vLLM mixes it into its worker class."""

    _llumnix_lanes: dict[str, _TransferLane]
    _llumnix_memory: tuple[KvMemory, StagingPool]

    def llumnix_send(self, blocks: list[int], job: Any) -> None:
        """Begin to send these blocks; returns at once. Without blocks: meet the other worker."""
        self._llumnix_order(blocks, job, sends=True)

    def llumnix_receive(self, blocks: list[int], job: Any) -> None:
        """Begin to receive into these blocks; returns at once."""
        self._llumnix_order(blocks, job, sends=False)

    def llumnix_reads(self, pair: str, group: str) -> bool:
        """Whether blocks of the other instance of a pair can be read in place, by this carrier."""
        return self._llumnix_reader(pair, group) is not None

    def llumnix_pull(self, pair: str, group: str, theirs: list[int], mine: list[int]) -> bool:
        """Fill blocks from the other instance's before the next step of the model; if it can be.

        They must be complete there, and stay held until that step has ended.
        """
        reader = self._llumnix_reader(pair, group)
        if reader is None:
            return False
        try:
            reader.pull(theirs, mine)
        except Exception:  # whatever it is, the request can be computed anew
            logger.exception("blocks that were lent could not be read")
            return False
        return True

    def llumnix_abort(self, pair: str) -> None:
        """Cut off the transfer that is under way between two instances."""
        if (lane := self._llumnix_all().pop(pair, None)) is not None:
            lane.abort()

    def _llumnix_reader(self, pair: str, group: str) -> Reader | None:
        lane = self._llumnix_all().get(pair)
        carrier = lane.carrier if lane is not None and lane.name_of_carrier == group else None
        return carrier if isinstance(carrier, Reader) and not carrier.aborted else None

    def _llumnix_all(self) -> dict[str, _TransferLane]:
        if not hasattr(self, "_llumnix_lanes"):
            self._llumnix_lanes = {}
        return self._llumnix_lanes

    def _llumnix_kv(self) -> tuple[KvMemory, StagingPool]:
        """The KV cache of this worker; another one after its memory was made anew."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        tensors, blocks = runner.kv_caches, runner.kv_cache_config.num_blocks
        known = getattr(self, "_llumnix_memory", None)
        if known is None or known[0].first is not tensors[0]:
            self._llumnix_memory = KvMemory(tensors, blocks), StagingPool()
        return self._llumnix_memory

    def _llumnix_order(self, blocks: list[int], job: Any, sends: bool) -> None:
        job = msgspec.convert(job, Job)
        lanes = self._llumnix_all()
        lane = lanes.get(job.pair)
        if lane is None or not lane.is_alive():
            memory, pool = self._llumnix_kv()
            lane = _TransferLane(job.pair, self.rank, memory, pool)  # type: ignore[attr-defined]
            lanes[job.pair] = lane
            lane.start()
        ready = None
        if lane.memory.device.type == "cuda":
            ready = torch.cuda.current_stream().record_event()
        lane.orders.put(_Order(job, sends, blocks, ready))
