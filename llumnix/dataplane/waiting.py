"""Requests that wait for an instance: how long, and who looks first when one may have come."""

import asyncio
import contextlib
import itertools
import random
from dataclasses import dataclass
from typing import NamedTuple

RETRY_SECONDS = 0.25, 0.75  # between looks for an instance, unless the cluster changes before
SHORTEST = 0.5  # seconds of a wait, for one try at least
# That a wait goes on behind the last look which saw an instance start: it is up by now, or has
# failed. Some looks long, as the next one must find it among those that are ready.
HOPE_SECONDS = 3.0


@dataclass(frozen=True)
class WaitLimits:
    """How long requests wait for an instance, in seconds."""

    failover: float = 30.0  # where none is ready, and none starts
    start: float = 600.0  # where one is starting all the time

    def begin(self, since: float) -> "Wait":
        """A wait that began at this time (monotonic)."""
        return Wait(self, since)


class Wait:
    """One request's wait: when it ends, and what its client is told then."""

    def __init__(self, limits: WaitLimits, since: float) -> None:
        self._limits = limits
        self._began = since
        self._until = since + max(limits.failover, SHORTEST)
        self._longest = max(self._until, since + limits.start)
        self._longer = False

    def go_on(self, now: float) -> None:
        """An instance is starting at this moment: wait for it."""
        until = min(now + HOPE_SECONDS, self._longest)
        if until > self._until:
            self._until, self._longer = until, True

    def left(self, now: float) -> float:
        """The seconds until it has been long enough; 0 or less from then on."""
        return self._until - now

    @property
    def sentence(self) -> str:
        """What has been waited for in vain."""
        limits, option, end = self._limits, "--failover-timeout", ""
        seconds = max(limits.failover, SHORTEST)
        if self._longer:
            seconds = round(self._until - self._began)
            option = "--start-timeout" if self._until == self._longest else option
            end = "" if self._until == self._longest else ", nor has one that was starting come up"
        return f"no instance was ready within {seconds:g} s ({option}){end}"


class _Place(NamedTuple):
    """A request's place in the queue: by priority, then by arrival, then as it came here."""

    priority: int  # vLLM's: the lower, the sooner
    arrival: float  # seconds, the clock of the API server
    number: int
    since: float  # seconds, the loop's clock
    look: asyncio.Future[None]


class WaitingRoom:
    """Has those who wait look again together, one behind the other; lives on one event loop.

    They run in the order of their places, so what they ask of the dispatcher, which answers in
    turn, is in that order too.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, priority: int, arrival: float, within: float) -> None:
        """Until it is time to look again, for at most `within` seconds."""
        loop = asyncio.get_running_loop()
        number, look = next(self._numbers), loop.create_future()
        self._places.append(_Place(priority, arrival, number, loop.time(), look))
        self._set_timer(loop)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(within, 0.0)):
                await look

    def look(self, longer_than: float = 0.0) -> None:
        """Have all look again now, or those that have waited for some seconds."""
        loop = asyncio.get_running_loop()
        since = loop.time() - longer_than
        ready = sorted(place for place in self._places if place.since <= since)
        self._places = [p for p in self._places if p.since > since and not p.look.done()]
        for place in ready:
            if not place.look.done():  # else it has waited long enough, or is cancelled
                place.look.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._set_timer(loop)

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._places and self._timer is None:
            shortest, longest = RETRY_SECONDS
            # At random, so that the nodes of a cluster don't all look at once.
            pause = random.uniform(shortest, longest)
            self._timer = loop.call_later(pause, self.look, shortest)
