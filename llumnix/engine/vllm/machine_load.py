"""Whether this machine has had time to give: what a node sees of it, and of all its engines."""

import time
from collections.abc import Callable
from pathlib import Path

from llumnix.cluster import InstanceId

FRESH_SECONDS = 1.5  # an engine that is well has answered within: it is asked after one in silence


class Machine:
    """What all engines of a node share; the node's loop alone calls it."""

    def __init__(
        self,
        pressure: Path = Path("/proc/pressure"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pressure = pressure
        self._clock = clock
        self._heard: dict[InstanceId, float] = {}

    def heard(self, instance: InstanceId, when: float) -> None:
        """An engine has answered, or brought outputs, at this time (monotonic)."""
        self._heard[instance] = when

    def others_progress(self, instance: InstanceId) -> bool:
        """Whether another engine of this node has answered just now."""
        since = self._clock() - FRESH_SECONDS
        return any(when > since for other, when in self._heard.items() if other != instance)

    def stalled(self) -> float | None:
        """Seconds in which something here waited for memory or a disk, since the start of time.

        None where the kernel does not tell.
        """
        try:
            return max(_total(self._pressure / name) for name in ("memory", "io"))
        except (OSError, ValueError, IndexError):
            return None


def _total(file: Path) -> float:
    """The microseconds at the end of its first line: some avg10=0.00 … total=1234."""
    return int(file.read_text().splitlines()[0].rpartition("total=")[2]) / 1e6
