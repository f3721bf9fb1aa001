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


@dataclass(frozen=True, slots=True)
class EngineEvents:
    """Where an engine reports to."""

    outputs: Callable[[EngineCoreOutputs], None]  # once for each step
    died: Callable[[str], None]  # at most once, with one sentence that tells why


@dataclass(frozen=True, slots=True)
class Transfer:
    """Some of a migration's KV blocks, on their way from one instance to another."""

    pair: str  # names the two instances, in this direction
    group: str  # which of their transfer groups; after a failure it is a new one
    first: int  # index of the first block in the request
    count: int  # blocks
    within: float  # seconds


class Blocks(Protocol):
    """The KV blocks of an engine, as far as migrations have to do with them.

    Blocks are counted from the beginning of the request and named by the hashes of what they hold.
    All methods raise EngineError with one sentence, and EngineDead if the engine is gone.
    """

    block_bytes: int  # of a block in all workers together; 0 until the first export

    async def export(self, migration: str, request_id: str) -> list[bytes]:
        """Hold all full blocks of a request, from now until `drop`; their hashes."""

    async def reserve(self, migration: str, hashes: list[bytes]) -> int:
        """Hold room for the next blocks; how many of them, from the first on, are here already."""

    async def send(self, migration: str, transfer: Transfer) -> int:
        """Send held blocks; returns when the last has left, with the number of bytes."""

    async def receive(self, migration: str, transfer: Transfer) -> int:
        """Receive into held blocks; returns when requests can use them, with the bytes."""

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
