"""The interface between llumnix and an inference engine.

An engine takes vLLM's own request type and answers with vLLM's own output type, whatever runs
behind it. All coroutines run on the node's event loop, and so do the callbacks.
"""

from collections.abc import Callable
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


@dataclass(frozen=True, slots=True)
class EngineEvents:
    """Where an engine reports to."""

    outputs: Callable[[EngineCoreOutputs], None]  # once for each step
    died: Callable[[str], None]  # at most once, with one sentence that tells why


class Engine(Protocol):
    """One inference engine in the life cycle start → (add, abort, call)* → stop."""

    @property
    def id(self) -> InstanceId:
        """The instance that this engine serves."""

    async def start(self, events: EngineEvents) -> EngineFacts:
        """Bring the engine up. Raises EngineError with one sentence if it does not come up."""

    async def add(self, request: EngineCoreRequest) -> None:
        """Queue a request. Raises EngineDead if the engine is gone."""

    async def abort(self, request_ids: list[str]) -> None:
        """End requests; ids that the engine does not know (any more) are no error."""

    async def call(self, method: str, *args: Any) -> Any:
        """Call one of the engine core's utility methods by name and return its result."""

    async def stop(self, timeout: float) -> None:
        """End the engine and everything it started within `timeout` seconds; never raises."""
