"""The interface between llumnix and an inference engine.

An engine takes vLLM's own request type and answers with vLLM's own output type, whatever runs
behind it. All coroutines run on the node's event loop, and so do the callbacks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

from llumnix.cluster import InstanceId


class EngineError(Exception):
    """An engine cannot do what was asked of it; the message is one sentence for the operator."""


class SetupFailed(EngineError):
    """Two instances found no way for KV blocks between them; a transfer has not begun."""


class RequestEnded(EngineError):
    """A request has no KV blocks here any more, as it has ended."""


class NoRoom(EngineError):
    """There are fewer free KV blocks than were asked for."""


class EngineDead(EngineError):
    """The engine is gone; what it was running has to go on elsewhere."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine knows of itself once it is up."""

    total_blocks: int
    block_size: int  # tokens in a KV block
    max_model_len: int  # tokens, prompt and output together
    tasks: tuple[str, ...]  # what the model can do: "generate", "embed", …
    resumes: bool = True  # whether a request may enter with outputs that it has already
    max_running: int = 0  # requests in a batch, at most; 0: not known


@dataclass(frozen=True, slots=True)
class Death:
    """The end of an engine that was up."""

    reason: str  # one sentence
    exception: str = ""  # the type of its own that ended it; empty if anything else did
    requests: frozenset[str] = frozenset()  # that it had at hand then, by the names that it knows


@dataclass(frozen=True, slots=True)
class EngineEvents:
    """Where an engine reports to."""

    outputs: Callable[[EngineCoreOutputs], None]  # once for each step
    died: Callable[[Death], None]  # at most once


@dataclass(frozen=True, slots=True)
class Transfer:
    """Some of a migration's KV blocks, on their way from one instance to another."""

    pair: str  # names the two instances, in this direction
    group: str  # which of their transfer groups; after a failure it is a new one
    first: int  # index of the first block in the request
    count: int  # blocks; 0: the two instances only meet
    within: float  # seconds
    skips: int = 0  # ways for blocks that are not tried, as they could not be set up


LEND_SECONDS = 5.0  # in which lent blocks are taken, or not at all


class Blocks(Protocol):
    """The KV blocks of an engine, as far as migrations have to do with them.

    Blocks are counted from the beginning of the request and named by the hashes of what they hold.
    All methods raise EngineError with one sentence, and EngineDead if the engine is gone.
    """

    block_bytes: int  # of a block in all workers together; 0 until the first export

    @property
    def ways(self) -> int:
        """How many ways there are for blocks to another engine, to be tried one after the other."""

    async def export(self, migration: str, request_id: str) -> list[bytes]:
        """Hold all full blocks of a request, from now until `drop`; their hashes."""

    async def reserve(self, migration: str, hashes: list[bytes]) -> int:
        """Hold room for the next blocks; how many of them, from the first on, are here already."""

    async def send(self, migration: str, transfer: Transfer) -> int:
        """Send held blocks; returns when the last has left, with the number of bytes."""

    async def receive(self, migration: str, transfer: Transfer) -> int:
        """Receive into held blocks; returns when requests can use them, with the bytes."""

    def reads(self, pair: str) -> bool:
        """Whether the destination of a pair reads this engine's memory, so that blocks can be lent.

        That is known from the last transfer of the pair on.
        """

    async def meet(self, transfer: Transfer, sends: bool) -> None:
        """Make ready for transfers of a pair. Raises SetupFailed if they are not possible."""

    async def lend(self, migration: str, request_id: str) -> list[int]:
        """Hold also the blocks behind the full ones, until `drop`; their ids in this engine."""

    async def expect(
        self, migration: str, request_id: str, transfer: Transfer, theirs: list[int]
    ) -> None:
        """Be ready to take lent blocks when the request comes, within `LEND_SECONDS`.

        They follow the blocks that have been received. A request that then comes with all of its
        tokens computed but the last needs no prefill.
        """

    async def drop(self, migration: str) -> None:
        """Hold no block for this migration any more; an unknown one is no error."""


class Engine(Protocol):
    """One inference engine in the life cycle start → (add, abort, call)* → stop."""

    @property
    def id(self) -> InstanceId:
        """The instance that this engine serves."""

    @property
    def blocks(self) -> Blocks:
        """Its KV blocks, for migrations."""

    async def start(self, events: EngineEvents) -> EngineFacts:
        """Bring the engine up. Raises EngineError with one sentence if it does not come up."""

    async def add(self, request: EngineCoreRequest, generated: Sequence[int] = ()) -> None:
        """Queue a request, or resume one that has generated tokens already.

        Raises EngineDead if the engine is gone, EngineError if it can't run the request.
        """

    async def abort(self, request_ids: list[str]) -> None:
        """End requests; ids that the engine does not know (any more) are no error."""

    async def call(self, method: str, *args: Any) -> Any:
        """Call one of the engine core's utility methods by name and return its result."""

    async def stop(self, timeout: float) -> None:
        """End the engine and everything it started within `timeout` seconds; never raises."""
