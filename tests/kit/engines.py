"""Small engines for the tests of what stands around an engine."""

import asyncio
from collections.abc import Sequence
from typing import Any

from vllm.v1.engine import EngineCoreRequest

from llumnix.engine.base import Death, EngineError, EngineEvents, EngineFacts

FACTS = EngineFacts(total_blocks=64, block_size=16, max_model_len=512, tasks=("generate",))


class IdleEngine:
    """Comes up at once, or when it is let; takes requests and never answers them."""

    def __init__(
        self,
        instance: str,
        up: asyncio.Event | None = None,
        adding: asyncio.Event | None = None,  # requests are taken only after this
    ) -> None:
        self._id = instance
        self._up = up
        self._adding = adding
        self._ended = asyncio.Event()
        self.events: EngineEvents | None = None
        self.requests: list[str] = []
        self.stops = 0

    @property
    def id(self) -> str:
        return self._id

    async def start(self, events: EngineEvents) -> EngineFacts:
        if self._up is not None:
            waits = [asyncio.ensure_future(e.wait()) for e in (self._up, self._ended)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        if self._ended.is_set():
            raise EngineError(f"instance {self._id} was stopped while it started")
        self.events = events
        return FACTS

    async def add(self, request: EngineCoreRequest, generated: Sequence[int] = ()) -> None:
        if self._adding is not None:
            await self._adding.wait()
        self.requests.append(request.request_id)

    async def abort(self, request_ids: list[str]) -> None:
        self.requests = [i for i in self.requests if i not in request_ids]

    async def call(self, method: str, *args: Any) -> Any:
        raise EngineError(f"an idle engine has no {method}")

    async def stop(self, timeout: float) -> None:
        self.stops += 1
        self._ended.set()

    def die(self, reason: str) -> None:
        """Call it on the loop."""
        assert self.events is not None
        self.events.died(Death(reason))


class FailingEngine(IdleEngine):
    """Does not come up, and says why."""

    async def start(self, events: EngineEvents) -> EngineFacts:
        raise EngineError(f"instance {self._id} did not start: no such model")
