"""Who may be to blame: instances that have just failed, and requests under which engines died.

An instance that has refused or lost a request had better not be tried for a moment: the registry
learns of a dead one a little later, and not at all while etcd is silent. And engines that die
together say nothing of a request: none that ran on one of them alone has done that.
"""

import time
from collections.abc import Callable, Iterable, Set

from llumnix.cluster import InstanceId
from llumnix.dataplane.frames import Lost
from llumnix.dataplane.hosted_request import TRIAL_TOKENS
from llumnix.dataplane.ledger import Entry

SUSPECT_SECONDS = 3.0  # about as long as a node that does not answer is waited for

DEATHS = 2  # of its engines that a request may survive: it may be what kills them
CRASHES = 8  # of its engines in all, however often it was found innocent in between
# In which deaths are taken for one event, of a machine or of whoever killed them.
WAVE_SECONDS = 1.0
# Deaths that a request is excused of so: two that kill engines would excuse each other for ever.
EXCUSED = 2


def is_suspect(entry: Entry) -> bool:
    """Whether a request may be what kills its engines, so that it is tried alone.

    It has lost two, or one by an exception in a step that it had just begun with.
    """
    return entry.deaths >= DEATHS or bool(entry.fault)


def is_given_up(entry: Entry) -> bool:
    """Whether so many engines have died of a request, or under it, that no other one is tried."""
    return entry.guilty or entry.deaths > DEATHS or entry.crashes > CRASHES


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


class DeathWave:
    """The deaths of engines that an API server has heard of lately."""

    def __init__(self) -> None:
        self._died: dict[InstanceId, float] = {}

    def add(self, instance: InstanceId) -> None:
        """Its engine has died just now."""
        now = time.monotonic()
        self._died = {i: at for i, at in self._died.items() if now - at <= WAVE_SECONDS}
        self._died[instance] = now

    def blame(self, entry: Entry, lost: Lost) -> None:
        """Count an engine's death against a request, of which it may yet be innocent."""
        former = entry.fault
        if is_suspect(entry) and (lost.together or entry.gained >= TRIAL_TOKENS):
            # It has passed a trial that took longer than others waited for it; or another API
            # server's suspect was on trial there too, and it is tried once more.
            entry.clear()
        entry.crashes += 1
        entry.died_under.add(lost.instance)
        entry.fault = lost.fault or entry.fault
        if entry.excused < EXCUSED and self._others_died(entry.died_under):
            entry.excused += 1
        else:
            entry.deaths += 1
            # What fails twice in the same way is not tried a third time.
            entry.guilty = lost.alone and bool(lost.fault) and lost.fault == former

    def _others_died(self, known: Set[InstanceId]) -> bool:
        now = time.monotonic()
        return any(now - at <= WAVE_SECONDS for i, at in self._died.items() if i not in known)
