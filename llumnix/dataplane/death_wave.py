"""Engines that die together: no request that ran on one of them alone has done that."""

import time
from collections.abc import Callable, Set

from llumnix.cluster import InstanceId

# In which deaths are taken for one event, of a machine or of whoever killed them.
WAVE_SECONDS = 1.0
# Deaths that a request is excused of so: two that kill engines would excuse each other for ever.
EXCUSED = 2


class DeathWave:
    """The deaths that an API server has heard of lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._died: dict[InstanceId, float] = {}

    def add(self, instance: InstanceId) -> None:
        """Its engine has died just now."""
        now = self._clock()
        self._died = {i: at for i, at in self._died.items() if now - at <= WAVE_SECONDS}
        self._died[instance] = now

    def beside(self, known: Set[InstanceId]) -> bool:
        """Whether others than these have died within the last WAVE_SECONDS."""
        now = self._clock()
        return any(now - at <= WAVE_SECONDS for i, at in self._died.items() if i not in known)
