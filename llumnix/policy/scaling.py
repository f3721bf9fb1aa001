"""How many instances a cluster should have: when one is added, when one goes, and which.

Source: Llumnix (OSDI'24): the mean freeness for normal priority is kept in a range [x, y]. Below x
for a period an instance is added; above y for a period the instance with the fewest running
requests goes. The mean is that of the paper's artifact: what is available in the whole cluster,
divided by all requests. (The mean of the instances' own F would be infinite as soon as one is
empty.) So are the number of new instances (as many as bring the mean to x at once, each counted as
empty) and the rule for going (above y also without the victim).

A constant load is not answered by going to and fro: what was added is what x needs, so that the
mean without it is below x, and not above y; what went left a mean above y, and not below x.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil, inf
from types import MappingProxyType

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, NodeId
from llumnix.policy.capacity import InstanceCounts, count_instances
from llumnix.policy.load import dispatch_usage
from llumnix.policy.priority_classes import NO_CLASSES, Classes


@dataclass(frozen=True, slots=True)
class ScalingTerms:
    """The operator's side of scaling; the same on all nodes of a cluster.

    Raises:
        ValueError: the numbers contradict each other.
    """

    low: float = 10.0  # x, in KV blocks a request
    high: float = 60.0  # y
    period: float = 10.0  # seconds for which the mean must be out of the range
    cooldown: float = 30.0  # seconds after a change in which there is no other
    minimum: int = 1  # instances in the cluster, of those that serve
    maximum: int = 16
    patience: float = 600.0  # seconds that instances on their way are waited for

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(
                f"the wanted range of the mean freeness is {self.low} to {self.high}, but must "
                "begin above 0 and not end below its beginning"
            )
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(
                f"there are to be {self.minimum} to {self.maximum} instances, but that must begin "
                "at 1 or more and not end below its beginning"
            )
        for name in ("period", "cooldown", "patience"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"the {name} of scaling is {getattr(self, name)} seconds")


class Action(StrEnum):
    """What is done to the number of instances."""

    ADD = "adds"
    KEEP = "keeps"  # what was about to go
    REMOVE = "removes"


@dataclass(frozen=True, slots=True)
class Decision:
    """New numbers of instances that are desired on nodes, and why."""

    action: Action
    desired: Mapping[NodeId, int]
    reason: str
    victim: InstanceId | None = None  # which one goes, where one does

    @property
    def sentence(self) -> str:
        """What is done, on one line."""
        where = " and ".join(f"{number} on {node}" for node, number in self.desired.items())
        what = f"removes {self.victim}" if self.victim else f"{self.action.value} instances"
        return f"{what}: desired are {where}, as {self.reason}"


@dataclass(frozen=True, slots=True)
class Supply:
    """What the instances that serve have, and for how many requests, wherever these are now."""

    available: int  # KV blocks neither used, nor asked for by the queues, nor kept as headroom
    requests: int  # running and waiting
    blocks: float  # of an instance, on average

    def mean(self, further: float = 0.0) -> float:
        """The mean freeness, with so many further blocks, in blocks a request.

        Without any request it is all that there is: one that came would have that.
        """
        return (self.available + further) / max(1, self.requests)

    def missing_to(self, low: float) -> int:
        """How many more instances, counted as empty, bring the mean to `low`."""
        short = low * self.requests - self.available
        return ceil(short / self.blocks) if self.blocks and short > 0 else 0


def supply(
    view: ClusterView,
    serving: Mapping[InstanceId, InstanceInfo],
    classes: Classes = NO_CLASSES,
) -> Supply:
    """What these instances have for requests of normal priority, which see headroom as used.

    What runs on instances that drain is about to come to these: it counts as theirs,
    and so the mean is the same while an instance drains and after it.
    """
    total = available = sum(info.total_blocks for info in serving.values())
    requests = 0
    for instance, load in view.loads.items():
        if instance in view.instances:
            available -= dispatch_usage(load)
            requests += load.running + load.waiting
        if instance in serving:
            available -= classes.headroom(serving[instance], load.priorities)
    return Supply(available, requests, total / len(serving) if serving else 0.0)


def mean_freeness(view: ClusterView, classes: Classes = NO_CLASSES) -> float:
    """The mean that scaling goes by, of the instances that serve; in KV blocks a request."""
    return supply(view, count_instances(view).serving, classes).mean()


def victim(serving: Mapping[InstanceId, InstanceInfo], view: ClusterView) -> InstanceInfo | None:
    """The instance with the fewest running requests; of these the youngest, by its number."""

    def key(info: InstanceInfo) -> tuple[int, int]:
        load = view.loads.get(info.id)
        return (load.running, load.waiting) if load else (0, 0)

    youngest_first = sorted(serving.values(), key=lambda i: (len(i.id), i.id), reverse=True)
    return min(youngest_first, key=key, default=None)


@dataclass(slots=True)
class _Timers:
    side: Action | None = None  # what the mean asks for
    since: float = 0.0  # for how long it has been on this side
    acted: float = -inf  # when the number was changed last
    missing: Mapping[NodeId, int] = field(default_factory=lambda: MappingProxyType({}))
    missing_since: float = 0.0


class Scaler:
    """The scaling of one leader's term; a plain object whose time is told to it, in seconds."""

    def __init__(self, terms: ScalingTerms, classes: Classes = NO_CLASSES) -> None:
        self._terms = terms
        self._classes = classes
        self._timers = _Timers()

    def forget(self) -> None:
        """Forget for how long the mean has been where it is, as the cluster was out of sight."""
        self._timers.side = None

    def decide(self, view: ClusterView, now: float) -> Decision | None:
        """The change to be made now; to be asked again and again, with `now` never going back."""
        found, timers = count_instances(view), self._timers
        if found.missing != timers.missing:
            timers.missing, timers.missing_since = found.missing, now
        have = supply(view, found.serving, self._classes)
        leaves = victim(found.serving, view)
        side = self._side(found, have, leaves)
        if side is not timers.side:
            timers.side, timers.since = side, now
        if side is None or now - timers.since < self._terms.period:
            return None
        if side is Action.ADD:
            decision = self._raise(found, have, now)
        else:
            decision = self._lower(found, have, leaves, now)
        if decision is not None:
            timers.side, timers.acted = None, now
        return decision

    def _side(
        self, found: InstanceCounts, have: Supply, leaves: InstanceInfo | None
    ) -> Action | None:
        """What the mean asks for, if it goes on being what it is."""
        terms = self._terms
        if found.wanted < terms.minimum or (found.serving and have.mean() < terms.low):
            return Action.ADD
        if leaves is None or found.wanted <= terms.minimum:
            return None
        # The requests of the one that goes stay, on the others; only its memory goes.
        return Action.REMOVE if have.mean(-leaves.total_blocks) > terms.high else None

    def _raise(self, found: InstanceCounts, have: Supply, now: float) -> Decision | None:
        """Keep what is about to go, which is there already; else start further instances."""
        if found.draining:
            room = {node: min(found.places[node].room, n) for node, n in found.draining.items()}
            return self._further(Action.KEEP, found, have, room)
        late = now - self._timers.missing_since >= self._terms.patience
        if self._rests(now) or (found.missing and not late):
            return None
        room = {node: place.room for node, place in found.places.items()}
        return self._further(Action.ADD, found, have, room)

    def _lower(
        self, found: InstanceCounts, have: Supply, leaves: InstanceInfo | None, now: float
    ) -> Decision | None:
        """Remove one instance, when no other change is under way."""
        late = any(place.up > place.wanted for place in found.places.values())
        if leaves is None or self._rests(now) or found.missing or found.draining or late:
            return None
        desired = {leaves.node: found.places[leaves.node].wanted - 1}
        terms, without = self._terms, have.mean(-leaves.total_blocks)
        reason = (
            f"the mean freeness without it is {without:.1f} blocks a request, and has been above "
            f"{terms.high:g} for {terms.period:g} s"
        )
        return Decision(Action.REMOVE, desired, reason, leaves.id)

    def _further(
        self, action: Action, found: InstanceCounts, have: Supply, room: Mapping[NodeId, float]
    ) -> Decision | None:
        """As many more as are needed, each on the node that is to have the fewest."""
        terms = self._terms
        number = max(found.missing_to(terms.minimum), have.missing_to(terms.low), 1)
        numbers = {node: found.places[node].wanted for node in room}
        desired: dict[NodeId, int] = {}
        for _ in range(min(number, terms.maximum - found.total)):
            open_ones = [n for n in room if numbers[n] - found.places[n].wanted < room[n]]
            if not open_ones:
                break
            node = min(open_ones, key=lambda n: (numbers[n], n))
            numbers[node] = desired[node] = numbers[node] + 1
        return Decision(action, desired, self._shortage(found, have)) if desired else None

    def _shortage(self, found: InstanceCounts, have: Supply) -> str:
        terms = self._terms
        if found.wanted < terms.minimum:
            return f"{found.wanted} in the cluster are fewer than {terms.minimum}"
        return (
            f"the mean freeness is {have.mean():.1f} blocks a request, and has been below "
            f"{terms.low:g} for {terms.period:g} s"
        )

    def _rests(self, now: float) -> bool:
        return now - self._timers.acted < self._terms.cooldown
