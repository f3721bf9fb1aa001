"""The modelled engine as an instance: vLLM's request and output types around a modelled device.

The clock is injected, so that the same code runs in real and in virtual time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
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
from llumnix.engine.base import EngineDead, EngineError, EngineEvents, EngineFacts
from llumnix.engine.sim.blocks import SimBlocks
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
        self._id = instance
        self._clock = clock or Clock()
        self._model = ModelledEngine(config)
        self._config = config
        self.blocks = SimBlocks(self._model)
        self._work = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._events: EngineEvents | None = None
        # Of preempted requests, to go out with the next output of each, as vLLM's do.
        self._preempted: dict[str, list[EngineCoreEvent]] = {}

    @property
    def id(self) -> InstanceId:
        """The instance that this engine serves."""
        return self._id

    @property
    def model(self) -> ModelledEngine:
        """The modelled engine itself, for checks in tests."""
        return self._model

    async def start(self, events: EngineEvents) -> EngineFacts:
        """Begin to step; a modelled engine is up at once."""
        self._events = events
        self._loop_task = asyncio.create_task(self._run(events), name=f"sim-{self._id}")
        config = self._config
        return EngineFacts(
            config.total_blocks, config.block_size, config.max_model_len, ("generate",)
        )

    async def add(self, request: EngineCoreRequest, generated: Sequence[int] = ()) -> None:
        """Queue a request. Raises EngineDead after stop or die, EngineError for a bad one."""
        if self._loop_task is None:
            raise EngineDead(f"instance {self._id} is not running")
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None:
            raise EngineError("a modelled engine takes token prompts and sampling parameters only")
        if params.logprobs is not None or params.prompt_logprobs is not None:
            raise EngineError("a modelled engine has no logprobs")
        if params.structured_outputs is not None:
            raise EngineError("a modelled engine's tokens follow no grammar")
        try:
            self._model.add(
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
        self._model.abort(request_ids)
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
        self.blocks.gone = f"instance {self._id} is not running"
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
            self._loop_task = None

    def die(self, reason: str) -> None:
        """End as a crashed engine does: at once, with everything it was running."""
        if self._loop_task is not None and self._events is not None:
            self._loop_task.cancel()
            self._loop_task = None
            self.blocks.gone = reason
            self._events.died(reason)

    async def _run(self, events: EngineEvents) -> None:
        while True:
            if not self._model.has_work:
                self._work.clear()
                await self._work.wait()
            result = self._model.step()
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
            model = self._model
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
