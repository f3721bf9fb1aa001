"""One engine's life: start, restart with back-off when it dies, drain, stop.

The engine itself lives on the node's event loop; the actor sends coroutines there and is told
what became of them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, NamedTuple

from pykka import ActorDeadError

from llumnix.actors.base import Actor
from llumnix.backoff import Backoff
from llumnix.cluster import InstanceId, InstanceState
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.engine.base import EngineError, EngineFacts

logger = logging.getLogger(__name__)

BACKOFF_FIRST, BACKOFF_LONGEST = 1.0, 30.0  # seconds before a restart
STEADY_SECONDS = 30.0  # up for so long, an engine's earlier failures are forgotten
DRAIN_POLL = 0.1  # seconds between looks at an instance that drains
STOP_SECONDS = 10.0  # for an engine to end by itself


class Life(StrEnum):
    """The phases of an instance as its actor sees them."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    BACKING_OFF = "backing off"
    STOPPED = "stopped"


class Report(NamedTuple):
    """What an instance's actor tells its owner on each change."""

    instance: InstanceId
    life: Life
    facts: EngineFacts | None
    reason: str = ""
    failed_starts: int = 0  # in a row, since the engine was up the last time

    @property
    def state(self) -> InstanceState:
        """The state as the cluster knows it."""
        known = {Life.READY: InstanceState.READY, Life.DRAINING: InstanceState.DRAINING}
        return known.get(self.life, InstanceState.STARTING)


@dataclass
class _Drain:
    """One drain as it is on the loop, where alone it changes."""

    ends: bool = False  # the engine is being stopped
    called_off: bool = False


class InstanceActor(Actor):
    """Supervises one instance; `tell` is called on the actor's thread with each change."""

    def __init__(
        self,
        instance: InstanceId,
        make: Callable[[], HostedInstance],
        loop: asyncio.AbstractEventLoop,
        tell: Callable[[Report], None],
    ) -> None:
        super().__init__()
        self._instance = instance
        self._make = make  # a new engine for each start; called on the loop
        self._loop = loop
        self._tell = tell
        self._life = Life.STOPPED
        self._reason = ""
        self._facts: EngineFacts | None = None
        self._hosted: HostedInstance | None = None
        self._backoff = Backoff(BACKOFF_FIRST, BACKOFF_LONGEST)
        self._failed_starts = 0  # in a row
        self._up_since = 0.0  # monotonic
        self._draining = _Drain()
        self._begun = 0  # starts so far; what a former engine reports late is ignored

    def on_failure(
        self,
        exception_type: type[BaseException] | None,
        exception_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nobody would stop the engine any more."""
        super().on_failure(exception_type, exception_value, traceback)
        if self._hosted is not None and self._life is not Life.STOPPED:
            self._send(self._hosted.stop(0.0))

    def begin(self) -> None:
        """Start the engine."""
        self._begun += 1
        self._become(Life.STARTING, facts=None)
        self._send(self._bring_up(self._begun))

    def drain(self, within: float) -> None:
        """Take no new requests, let those here end within so many seconds, then stop."""
        if self._life in (Life.READY, Life.STARTING, Life.BACKING_OFF):
            self._draining = _Drain()
            self._become(Life.DRAINING, self._facts)
            self._send(self._drain_and_stop(within, self._draining))

    def keep(self) -> None:
        """Go on after all, if it drains and was up; nothing happens once it has begun to stop."""
        if self._life is Life.DRAINING and self._facts is not None:
            self._send(self._call_off(self._draining))

    def halt(self) -> None:
        """Stop the engine now."""
        if self._life is not Life.STOPPED:
            self._send(self._drain_and_stop(0.0, _Drain()))

    def report(self) -> None:
        """Tell what the last change was, once more if need be."""
        facts, failed = self._facts, self._failed_starts
        self._tell(Report(self._instance, self._life, facts, self._reason, failed))

    # ---- what the loop tells this actor ----

    def came_up(self, start: int, hosted: HostedInstance, facts: EngineFacts) -> None:
        """The engine is up."""
        if start == self._begun and self._life is Life.STARTING:
            self._hosted, self._up_since = hosted, time.monotonic()
            self._failed_starts = 0
            self._become(Life.READY, facts)

    def went_down(self, start: int, reason: str) -> None:
        """The engine did not come up, or died."""
        if start == self._begun and self._life is Life.DRAINING:
            self._facts = None  # if it is kept now, it must start anew
        if start != self._begun or self._life not in (Life.STARTING, Life.READY):
            return
        was_up = self._life is Life.READY
        if was_up and time.monotonic() - self._up_since >= STEADY_SECONDS:
            self._backoff.reset()
        delay = self._backoff.delay()
        self._failed_starts += not was_up
        logger.error("%s; next start in %.0f s", reason, delay)
        self._become(Life.BACKING_OFF, None, reason)
        self._send(self._later(delay))

    def retry(self) -> None:
        """The back-off is over."""
        if self._life is Life.BACKING_OFF:
            self.begin()

    def kept(self, drain: _Drain) -> None:
        """The drain was called off."""
        if drain is not self._draining or self._life is not Life.DRAINING:
            return
        if self._facts is not None:
            self._become(Life.READY, self._facts)
        else:  # it has died while it drained
            self.begin()

    def stopped(self) -> None:
        """The engine has ended and its processes are gone."""
        self._become(Life.STOPPED, None)

    # ---- on the loop ----

    async def _bring_up(self, start: int) -> None:
        try:
            hosted = self._make()
        except Exception as error:  # a slot that cannot be filled now is tried again later
            self._handle.tell(InstanceActor.went_down, start, self._unexpected(error))
            return
        self._hosted = hosted
        try:
            facts = await hosted.start(lambda reason: self._send(self._bury(hosted, start, reason)))
        except EngineError as error:
            await self._bury(hosted, start, str(error))
        except Exception as error:
            await self._bury(hosted, start, self._unexpected(error))
        else:
            self._handle.tell(InstanceActor.came_up, start, hosted, facts)

    def _unexpected(self, error: Exception) -> str:
        logger.error("instance %s did not start", self._instance, exc_info=error)
        text = " ".join(str(error).split())  # in one line
        return f"instance {self._instance} did not start: {type(error).__name__}: {text}"

    async def _bury(self, hosted: HostedInstance, start: int, reason: str) -> None:
        await hosted.stop(0.0)
        self._handle.tell(InstanceActor.went_down, start, reason)

    async def _call_off(self, drain: _Drain) -> None:
        if not drain.ends:
            drain.called_off = True
            self._handle.tell(InstanceActor.kept, drain)

    async def _drain_and_stop(self, within: float, drain: _Drain) -> None:
        hosted = self._hosted
        if hosted is not None:
            try:
                async with asyncio.timeout(within):
                    while hosted.requests and not drain.called_off:
                        await asyncio.sleep(DRAIN_POLL)
            except TimeoutError:
                if within > 0 and not drain.called_off:
                    names = ", ".join(sorted(request.request_id for request in hosted.requests))
                    logger.warning(
                        "instance %s stops after %.0f s with %d requests: %s",
                        *(hosted.id, within, len(hosted.requests), names),
                    )
            if drain.called_off:
                return
            drain.ends = True
            await hosted.stop(STOP_SECONDS)
        drain.ends = True
        self._handle.tell(InstanceActor.stopped)

    async def _later(self, delay: float) -> None:
        await asyncio.sleep(delay)
        self._handle.tell(InstanceActor.retry)

    def _send(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).add_done_callback(_complain)

    def _become(self, life: Life, facts: EngineFacts | None, reason: str = "") -> None:
        self._life, self._facts, self._reason = life, facts, reason
        self.report()


def _complain(done: "Future[None]") -> None:
    """A bug in a coroutine must be seen: nobody waits for its result."""
    if done.cancelled() or (error := done.exception()) is None:
        return
    if not isinstance(error, ActorDeadError):  # that one was stopped, and need not be told
        logger.error("an instance's task failed", exc_info=error)
