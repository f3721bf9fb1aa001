"""Virtual time: what happens next, and when."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any


class VirtualClock:
    """A queue of events; those of one moment happen in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        """Have something happen at a time, or now if that has passed."""
        heappush(self._events, (max(when, self.now), next(self._numbers), what, args))

    def after(self, seconds: float, what: Callable[..., None], *args: Any) -> None:
        """Have something happen so many seconds from now."""
        heappush(self._events, (self.now + seconds, next(self._numbers), what, args))

    def run(self, until: Callable[[], bool], longest: float) -> None:
        """Let things happen until that is so, nothing is left, or the time is up."""
        events = self._events
        while events and not until():
            when, _, what, args = heappop(events)
            if when > longest:
                return
            self.now = when
            what(*args)
