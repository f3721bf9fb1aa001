"""Metrics where a node's API servers are processes: each writes its own into files of the node.

prometheus_client adds them up at a scrape, those of processes that have ended among them.
"""

import asyncio
from collections.abc import Callable

from prometheus_client import Counter, Gauge

from llumnix.metrics import DISPATCHES, DROPPED_OUTPUTS, OPEN_REQUESTS, Counts

EVERY = 1.0  # seconds between two writings


class ProcessMetrics:
    """What an API server has open and has done; written now and then, not for each request."""

    def __init__(self) -> None:
        self._open = Gauge(*OPEN_REQUESTS, multiprocess_mode="livesum")
        self._dispatches = Counter(*DISPATCHES, ["instance"])
        self._dropped = Counter(*DROPPED_OUTPUTS, ["reason"])
        self._told = Counts()

    async def publish(self, counts: Callable[[], Counts]) -> None:
        """Write them again and again."""
        while True:
            self.write(counts())
            await asyncio.sleep(EVERY)

    def write(self, now: Counts) -> None:
        """Write what has come since the last time."""
        told, self._told = self._told, now
        self._open.set(now.open_requests)
        for counter, new, old in (
            (self._dispatches, now.dispatched, told.dispatched),
            (self._dropped, now.dropped, told.dropped),
        ):
            for label, value in new.items():
                if more := value - old.get(label, 0):
                    counter.labels(label).inc(more)
