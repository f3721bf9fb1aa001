"""What vLLM's frontend asks of its engine beside requests: it goes to all instances."""

import asyncio
import hashlib
import inspect
import logging
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient

from llumnix.cluster import InstanceId, NodeId
from llumnix.dataplane.exchange import Exchange
from llumnix.engine.base import EngineError

logger = logging.getLogger(__name__)

REQUESTS = {"add_request_async", "abort_requests_async", "get_output_async"}
CALL_SECONDS = 30.0  # the longest that a utility call may take
# Those that may wait for what runs to end; a lost instance or link ends them too.
PATIENT = {"pause_scheduler", "sleep", "wake_up"}
# vLLM's words when KV blocks are held though no request runs. Here a migration may still hold them.
BLOCKS_HELD = "Failed to reset KV cache"
HELD_SECONDS = 15.0  # for which that may be so
POLL = 0.1  # seconds between tries


LARGEST = 2**31 - 1  # that vLLM's model runners keep


class Adapters:
    """The LoRA adapters of one frontend, under the numbers that all engines know them by.

    vLLM's frontend counts its own adapters from 1. An engine that has an adapter of a number does
    not look at its name: so one node's requests would run with another node's adapter.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # the frontend's → the cluster's

    def shared(self, adapter: LoRARequest) -> LoRARequest:
        """The adapter under its number in the cluster, which its name and its path make up."""
        told = f"{adapter.lora_name}\0{adapter.lora_path}".encode()
        number = int.from_bytes(hashlib.sha256(told).digest()[:8], "big") % LARGEST + 1
        self._numbers[adapter.lora_int_id] = number
        return msgspec.structs.replace(adapter, lora_int_id=number)

    def number(self, own: int) -> int:
        """The number in the cluster of one that the frontend has loaded; else the same."""
        return self._numbers.get(own, own)


class UtilityCalls(EngineCoreClient):
    """The part of an engine-core client that has no request of its own to run."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._adapters = Adapters()

    @property
    @abstractmethod
    def instances(self) -> Mapping[InstanceId, NodeId]:
        """The instances that are ready, wherever they are."""

    async def get_supported_tasks_async(self) -> tuple[Any, ...]:
        """What the model can do, as the first instance that answers says."""
        for instance, node in self.instances.items():
            try:
                answer = await self._exchange.call(
                    node, instance, "get_supported_tasks", (), CALL_SECONDS
                )
                return tuple(answer)
            except (EngineError, TimeoutError) as error:
                logger.warning("instance %s did not tell its tasks: %s", instance, error)
        raise EngineError("no instance is ready")

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        """Load an adapter everywhere; an instance that comes later loads it when it needs it."""
        loaded = await self._broadcast("add_lora", self._adapters.shared(lora_request))
        return bool(loaded)

    async def remove_lora_async(self, lora_id: int) -> bool:
        """Unload an adapter everywhere."""
        return bool(await self._broadcast("remove_lora", self._adapters.number(lora_id)))

    async def pin_lora_async(self, lora_id: int) -> bool:
        """Keep an adapter in the memory of all instances."""
        return bool(await self._broadcast("pin_lora", self._adapters.number(lora_id)))

    async def _broadcast(self, method: str, *args: Any) -> Any:
        """Call a utility method everywhere; booleans are and-ed, else the first answer counts."""
        # Those of this node too that others do not see yet: the frontend opens before they do.
        own = {
            i: self._exchange.node
            for i, h in self._exchange.hosted.items()
            if h.facts and not h.gone
        }
        targets = own | dict(self.instances)
        if not targets:
            raise EngineError("no instance is ready")
        answers = await asyncio.gather(
            *(self._call(node, instance, method, args) for instance, node in targets.items())
        )
        return all(answers) if isinstance(answers[0], bool) else answers[0]

    async def _call(
        self, node: NodeId, instance: InstanceId, method: str, args: tuple[Any, ...]
    ) -> Any:
        within = None if method in PATIENT else CALL_SECONDS
        give_up = None
        while True:
            try:
                return await self._exchange.call(node, instance, method, args, within)
            except EngineError as error:
                if method not in PATIENT or BLOCKS_HELD not in str(error):
                    raise
                if give_up is None:
                    logger.info(
                        "%s at %s waits for a migration that holds blocks", method, instance
                    )
                    give_up = time.monotonic() + HELD_SECONDS
                if time.monotonic() >= give_up:
                    raise
            await asyncio.sleep(POLL)


def _utility(name: str) -> Callable[..., Awaitable[Any]]:
    signature = inspect.signature(getattr(AsyncMPClient, name))

    async def call(self: UtilityCalls, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        return await self._broadcast(name.removesuffix("_async"), *bound.args[1:])

    return call


# Every other coroutine of vLLM's own client is a utility call, and goes to all instances.
for _name in set(dir(AsyncMPClient)) - set(UtilityCalls.__dict__) - REQUESTS:
    if _name.endswith("_async") and not _name.startswith(("_", "call_utility")):
        setattr(UtilityCalls, _name, _utility(_name))
