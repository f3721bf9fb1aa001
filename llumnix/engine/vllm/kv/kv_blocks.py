"""The KV blocks of a vLLM engine: held by utility calls; its workers tell of their transfers."""

import asyncio
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from llumnix.engine.base import EngineError, NoRoom, RequestEnded, SetupFailed, Transfer
from llumnix.engine.vllm.kv.carrier import LADDER
from llumnix.engine.vllm.kv.transfer import Job, TransferEnd

logger = logging.getLogger(__name__)

GRACE = 1.0  # seconds beyond a transfer's own deadline until it is given up without an answer

Call = Callable[..., Awaitable[Any]]

# By the names under which an engine core tells of them.
REFUSALS: dict[str, type[EngineError]] = {e.__name__: e for e in (RequestEnded, NoRoom)}


@dataclass(frozen=True)
class Rendezvous:
    """Where the workers of two instances meet."""

    store: str  # qualified name of a torch.distributed store
    arguments: dict[str, Any]  # of its constructor
    address: str  # host name or address of this machine, at which others reach it
    ladder: tuple[str, ...] = LADDER  # the ways for blocks that may be taken, the best first


@dataclass
class _Pending:
    done: asyncio.Future[int]  # bytes
    ranks: int  # workers that have not answered
    bytes: int = 0
    errors: list[str] = field(default_factory=list)
    setup: bool = False  # whether it failed before there was a way for blocks
    kinds: set[str] = field(default_factory=set)  # of the workers' carriers


class VllmBlocks:
    """See `engine.base.Blocks`."""

    def __init__(self, call: Call, workers: int, rendezvous: Rendezvous) -> None:
        self._call = call
        self._workers = workers
        self._rendezvous = rendezvous
        self._path = ""
        self._socket: socket.socket | None = None
        self._pending: dict[str, _Pending] = {}
        self._reads: dict[str, bool] = {}  # by pair
        self.block_bytes = 0
        self.cpu_seconds = 0.0  # that the workers' transfers have taken

    def open(self, folder: Path) -> None:
        """Listen to the workers, at a socket in this folder."""
        self._path = str(folder / "transfers")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(self._path)
        asyncio.get_running_loop().add_reader(self._socket, self._on_notice)

    def close(self) -> None:
        """Hear no more; what is under way has failed."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        for pending in self._pending.values():
            if not pending.done.done():
                pending.done.set_exception(EngineError("the engine has stopped"))

    @property
    def ways(self) -> int:
        """How many ways there are to try, one after the other."""
        return len(self._rendezvous.ladder)

    async def export(self, migration: str, request_id: str) -> list[bytes]:
        """Hold all full blocks of a request; their hashes."""
        hashes, block_bytes = await self._operate("export", migration, request_id)
        self.block_bytes = block_bytes * self._workers
        return [bytes(block_hash) for block_hash in hashes]

    async def reserve(self, migration: str, hashes: list[bytes]) -> int:
        """Hold room for the next blocks; how many of them are here already."""
        return int(await self._operate("reserve", migration, hashes))

    async def send(self, migration: str, transfer: Transfer) -> int:
        """Send held blocks."""
        return await self._transfer("send", migration, transfer)

    async def receive(self, migration: str, transfer: Transfer) -> int:
        """Receive into held blocks, and put them into the prefix cache."""
        size = await self._transfer("receive", migration, transfer)
        await self._operate("store", migration)
        return size

    def reads(self, pair: str) -> bool:
        """Whether the last transfer of the pair was a reading of the other's memory."""
        return self._reads.get(pair, False)

    async def meet(self, transfer: Transfer, sends: bool) -> None:
        """Make a way for blocks, with the other instance, which is told the same."""
        await self._ordered("meet", transfer, (sends,))

    async def lend(self, migration: str, request_id: str) -> list[int]:
        """Hold also the blocks behind the full ones; their ids."""
        return list(await self._operate("lend", migration, request_id))

    async def expect(
        self, migration: str, request_id: str, transfer: Transfer, theirs: list[int]
    ) -> None:
        """Be ready to take lent blocks when the request comes."""
        await self._operate("expect", migration, request_id, transfer.pair, transfer.group, theirs)

    async def drop(self, migration: str) -> None:
        """Hold no block for this migration any more."""
        await self._operate("drop", migration)

    async def books(self) -> dict[str, int]:
        """What the engine says of its blocks; for checks."""
        return dict(await self._operate("books"))

    async def _operate(self, operation: str, *arguments: Any) -> Any:
        result, refusal, kind = await self._call("migration", operation, list(arguments))
        if refusal is not None:
            raise REFUSALS.get(kind, EngineError)(refusal)
        return result

    async def _transfer(self, operation: str, migration: str, transfer: Transfer) -> int:
        first = (migration, transfer.first, transfer.count)
        return await self._ordered(operation, transfer, first)

    async def _ordered(self, operation: str, transfer: Transfer, first: tuple[Any, ...]) -> int:
        """Order something of all workers and wait until each has told its end."""
        job = Job(
            id=uuid.uuid4().hex,
            pair=transfer.pair,
            group=transfer.group,
            seconds=transfer.within,
            notify=self._path,
            store=(self._rendezvous.store, self._rendezvous.arguments),
            address=self._rendezvous.address,
            ladder=list(self._rendezvous.ladder[transfer.skips :]),
        )
        done = asyncio.get_running_loop().create_future()
        pending = self._pending[job.id] = _Pending(done, self._workers)
        arguments = (*first, msgspec.to_builtins(job))
        ended = False
        try:
            async with asyncio.timeout(transfer.within + GRACE):
                await self._operate(operation, *arguments)
                size = await done
            ended = True
            self._reads[transfer.pair] = pending.kinds == {"memory"}
            return int(size)
        except TimeoutError as error:
            raise EngineError(f"a transfer took more than {transfer.within:.1f} s") from error
        finally:
            del self._pending[job.id]
            if not ended:
                # Nothing may read or write the blocks once they are given back.
                await asyncio.shield(self._abort(transfer.pair))

    async def _abort(self, pair: str) -> None:
        try:
            await self._operate("abort", pair)
        except EngineError as error:
            logger.info("the transfer %s could not be cut off: %s", pair, error)

    def _on_notice(self) -> None:
        assert self._socket is not None
        while True:
            try:
                message = self._socket.recv(4096)
            except BlockingIOError:
                return
            notice = msgspec.msgpack.decode(message, type=TransferEnd)
            self.cpu_seconds += notice.cpu
            pending = self._pending.get(notice.id)
            if pending is None:
                continue
            pending.ranks -= 1
            pending.bytes += notice.bytes
            pending.kinds.add(notice.kind)
            pending.setup |= notice.setup
            if notice.error is not None:
                pending.errors.append(notice.error)
            if pending.done.done() or (pending.ranks and not pending.errors):
                continue
            if pending.errors:
                failure = SetupFailed if pending.setup else EngineError
                pending.done.set_exception(failure(f"a transfer failed: {pending.errors[0]}"))
            else:
                pending.done.set_result(pending.bytes)
