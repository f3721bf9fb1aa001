"""Instances that had better not be tried for a moment: they have just refused or lost a request.

The registry learns of a dead instance a little later, and not at all while etcd is silent.
"""

import time
from collections.abc import Callable, Iterable

from llumnix.cluster import InstanceId

SUSPECT_SECONDS = 3.0  # about as long as a node that does not answer is waited for


class Suspects:
    """The instances under suspicion; each for SUSPECT_SECONDS from its last failure on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[InstanceId, float] = {}

    def add(self, instances: Iterable[InstanceId]) -> None:
        """They have failed just now."""
        until = self._clock() + SUSPECT_SECONDS
        self._until |= dict.fromkeys(instances, until)

    def now(self) -> frozenset[InstanceId]:
        """Those under suspicion at present."""
        now = self._clock()
        self._until = {i: until for i, until in self._until.items() if until > now}
        return frozenset(self._until)

    def clear(self, instances: Iterable[InstanceId]) -> None:
        """They have shown that they are well."""
        for instance in instances:
            self._until.pop(instance, None)
