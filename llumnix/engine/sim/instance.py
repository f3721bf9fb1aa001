"""The modelled engine as an instance: vLLM's request and output types around a modelled device.

The clock is injected, so that the same code runs in real and in virtual time.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.cluster import InstanceId
from llumnix.engine.base import (
    Death,
    EngineDead,
    EngineError,
    EngineEvents,
    EngineFacts,
    NoRoom,
    RequestEnded,
    Transfer,
)
from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.model import ModelledEngine
from llumnix.engine.sim.request import SimRequest

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(frozen=True)
class Clock:
    """Time as the engine sees it, in seconds."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class SimEngine:
    """A modelled engine that steps on the node's event loop while it has work."""

    def __init__(
        self, instance: InstanceId, config: ModelConfig, clock: Clock | None = None
    ) -> None:
        self.id = instance
        self._clock = clock or Clock()
        self.model = ModelledEngine(config)
        self._config = config
        self.blocks = SimBlocks(self.model)
        self._work = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._events: EngineEvents | None = None
        # Of preempted requests, to go out with the next output of each, as vLLM's do.
        self._preempted: dict[str, list[EngineCoreEvent]] = {}

    async def start(self, events: EngineEvents) -> EngineFacts:
        """Begin to step; a modelled engine is up at once."""
        self._events = events
        self._loop_task = asyncio.create_task(self._run(events), name=f"sim-{self.id}")
        config = self._config
        return EngineFacts(
            *(config.total_blocks, config.block_size, config.max_model_len, ("generate",)),
            max_running=config.max_num_seqs,
        )

    async def add(self, request: EngineCoreRequest, generated: Sequence[int] = ()) -> None:
        """Queue a request. Raises EngineDead after stop or die, EngineError for a bad one."""
        if self._loop_task is None:
            raise EngineDead(f"instance {self.id} is not running")
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None:
            raise EngineError("a modelled engine takes token prompts and sampling parameters only")
        if params.logprobs is not None or params.prompt_logprobs is not None:
            raise EngineError("a modelled engine has no logprobs")
        if params.structured_outputs is not None:
            raise EngineError("a modelled engine's tokens follow no grammar")
        try:
            self.model.add(
                SimRequest(
                    id=request.request_id,
                    prompt=request.prompt_token_ids,
                    max_tokens=params.max_tokens or self._config.max_model_len,
                    generated=len(generated),
                    cached=self.blocks.take(request.prompt_token_ids, len(generated)),
                    front=bool(generated),
                    stop_token_ids=params.stop_token_ids or (),
                    priority=request.priority,
                )
            )
        except ValueError as error:
            raise EngineError(str(error)) from error
        self._work.set()

    async def abort(self, request_ids: list[str]) -> None:
        """Abort requests."""
        self.model.abort(request_ids)
        for request_id in request_ids:
            self._preempted.pop(request_id, None)

    async def call(self, method: str, *args: Any) -> Any:
        """The few utility methods that make sense without a device."""
        answers: dict[str, Any] = {
            "get_supported_tasks": ("generate",),
            "reset_prefix_cache": True,
            "reset_mm_cache": None,
            "is_sleeping": False,
        }
        if method not in answers:
            raise EngineError(f"a modelled engine has no {method}")
        return answers[method]

    async def stop(self, timeout: float) -> None:
        """End the stepping task."""
        self.blocks.gone = f"instance {self.id} is not running"
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
            self._loop_task = None

    def die(self, reason: str, exception: str = "") -> None:
        """End as a crashed engine does: at once, with everything it was running.

        `exception`: the type of one that a step has raised.
        """
        if self._loop_task is not None and self._events is not None:
            self._loop_task.cancel()
            self._loop_task = None
            self.blocks.gone = reason
            step = frozenset(self.model.held()) if exception else frozenset[str]()
            self._events.died(Death(reason, exception, step))

    async def _run(self, events: EngineEvents) -> None:
        while True:
            if not self.model.has_work:
                self._work.clear()
                await self._work.wait()
            result = self.model.step()
            for request_id in result.preempted:
                event = EngineCoreEvent(EngineCoreEventType.PREEMPTED, self._clock.now())
                self._preempted.setdefault(request_id, []).append(event)
            await self._clock.sleep(result.seconds)
            outputs = [
                EngineCoreOutput(
                    request_id,
                    list(tokens),
                    finish_reason=_FINISH[finish] if finish else None,
                    events=self._preempted.pop(request_id, None),
                )
                for request_id, tokens, finish in result.outputs
            ]
            model = self.model
            stats = SchedulerStats(
                num_running_reqs=model.running,
                num_waiting_reqs=model.waiting,
                kv_cache_usage=model.used_blocks / self._config.total_blocks,
            )
            events.outputs(
                EngineCoreOutputs(
                    outputs=outputs, scheduler_stats=stats, timestamp=self._clock.now()
                )
            )


BLOCK_BYTES = 64  # that a modelled block counts for


@dataclass(slots=True)
class _Arriving:
    hashes: list[bytes] = field(default_factory=list)
    stored: int = 0  # how many of them have arrived


class SimBlocks:
    """The KV blocks of a modelled engine: no bytes move, but rooms are booked and hashes kept.

    A block is named by the prompt and its place, since a modelled stream's tokens follow from
    these. What has arrived becomes the resumed request's own when it comes; there is no prefix
    cache. See `engine.base.Blocks`.
    """

    block_bytes = BLOCK_BYTES
    ways = 1

    def __init__(self, model: ModelledEngine) -> None:
        self._model = model
        self._size = model.config.block_size
        self._arriving: dict[str, _Arriving] = {}
        self._leaving: set[str] = set()
        self.gone: str | None = None  # why there is no engine any more

    @property
    def held(self) -> int:
        """Migrations that something is held for; for checks."""
        return len(self._arriving) + len(self._leaving)

    def take(self, prompt: Sequence[int], generated: int) -> int:
        """How many tokens of a request have arrived; their blocks are held no more, but its own."""
        names = _names(prompt, (len(prompt) + generated) // self._size) if self._arriving else []
        for arriving in self._arriving.values():
            stored = arriving.hashes[: arriving.stored]
            if stored and stored == names[: len(stored)]:
                del arriving.hashes[: len(stored)]
                arriving.stored = 0
                self._model.hold(-len(stored))
                return len(stored) * self._size
        return 0

    async def export(self, migration: str, request_id: str) -> list[bytes]:
        """The hashes of a request's full blocks. Raises EngineError if it is not here."""
        self._check()
        computed = self._model.computed(request_id)
        if computed is None:
            raise RequestEnded(f"request {request_id} has ended")
        self._leaving.add(migration)
        return _names(self._model.prompt(request_id), computed // self._size)

    async def reserve(self, migration: str, hashes: list[bytes]) -> int:
        """Hold room for the next blocks; none of them is here. Raises EngineError."""
        self._check()
        try:
            self._model.hold(len(hashes))
        except ValueError as error:
            raise NoRoom(str(error)) from error
        self._arriving.setdefault(migration, _Arriving()).hashes += hashes
        return 0

    async def send(self, migration: str, transfer: Transfer) -> int:
        """Send held blocks. Raises EngineError if they are not held."""
        self._check()
        if migration not in self._leaving:
            raise EngineError(f"the blocks of migration {migration} are not held any more")
        return transfer.count * BLOCK_BYTES

    async def receive(self, migration: str, transfer: Transfer) -> int:
        """Receive into held blocks. Raises EngineError if they are not held."""
        self._check()
        arriving = self._arriving.get(migration)
        if arriving is None:
            raise EngineError(f"the blocks of migration {migration} are not held any more")
        arriving.stored = transfer.first + transfer.count
        return transfer.count * BLOCK_BYTES

    def reads(self, pair: str) -> bool:
        """There is no memory to be read."""
        return False

    async def meet(self, transfer: Transfer, sends: bool) -> None:
        """There is nobody to meet."""
        self._check()

    async def lend(self, migration: str, request_id: str) -> list[int]:
        """Nothing is lent. Raises EngineError."""
        raise EngineError("a modelled engine lends no blocks")

    async def expect(
        self, migration: str, request_id: str, transfer: Transfer, theirs: list[int]
    ) -> None:
        """Nothing is borrowed. Raises EngineError."""
        raise EngineError("a modelled engine borrows no blocks")

    async def drop(self, migration: str) -> None:
        """Hold no block for this migration any more."""
        self._check()
        self._leaving.discard(migration)
        arriving = self._arriving.pop(migration, None)
        if arriving is not None:
            self._model.hold(-len(arriving.hashes))

    def _check(self) -> None:
        if self.gone is not None:
            raise EngineDead(self.gone)


def _names(prompt: Sequence[int], blocks: int) -> list[bytes]:
    digest = hashlib.blake2b(repr(list(prompt)).encode(), digest_size=16).digest()
    return [digest + place.to_bytes(4, "big") for place in range(blocks)]
