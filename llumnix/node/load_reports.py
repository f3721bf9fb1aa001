"""Loads on their way from the instances to the registry: the latest wins, and not too often."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from llumnix.cluster import InstanceLoad
from llumnix.dataplane.hosted_instance import HostedInstance

INTERVAL = 0.2  # seconds between two reports, as the registry writes no faster
SETTLE = 0.005  # seconds from a change to the report of it, at the least


class LoadReporter:
    """Lives on the event loop; told of changes once a step, it reports at most every INTERVAL."""

    def __init__(
        self,
        hosted: Callable[[], Iterable[HostedInstance]],
        report: Callable[[Sequence[InstanceLoad]], None],
    ) -> None:
        self._hosted = hosted
        self._report = report
        self._timer: asyncio.TimerHandle | None = None
        self._sent = float("-inf")

    def changed(self) -> None:
        """Something about a load has changed; cheap, called in each step."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            # Not at once: what belongs to one step, or one burst, goes into one report.
            delay = max(self._sent + INTERVAL - loop.time(), SETTLE)
            self._timer = loop.call_later(delay, self._send)

    def stop(self) -> None:
        """Report no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _send(self) -> None:
        self._timer = None
        self._sent = asyncio.get_running_loop().time()
        self._report([hosted.load() for hosted in self._hosted() if hosted.facts is not None])
