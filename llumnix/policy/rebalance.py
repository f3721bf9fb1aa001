"""Who gives a request away, who takes it, and which one goes.

The pairs of one round of rescheduling are the leader's; the source of a move puts the rule and the
room that it has together, in a live cluster and in the simulator.

Source: Llumnix (OSDI'24): instances with a freeness below one threshold are sources, those above
another are destinations, and the lowest is paired with the highest, the second with the second, and
so on. An instance that drains has the freeness -inf (the paper's stand-in request of
infinite usage): it comes first of all sources, and takes nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf
from typing import NamedTuple

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceState
from llumnix.policy.decision_context import TERMS, Terms, Thresholds
from llumnix.policy.dispatch_state import is_candidate
from llumnix.policy.load import freeness, places, unclaimed, virtual_usage
from llumnix.policy.priority_classes import NO_CLASSES
from llumnix.policy.request_choice import (
    DRAIN_RULE,
    QUEUE,
    TAIL,
    MovableRequest,
    Room,
    choose,
    choose_together,
)

SPILL = "behind"  # the rule by which a request that waits goes where it need not
SPILL_FLOOR = 8.0  # the freeness that it must leave there, for all to grow; in blocks a request
START_FLOOR = 3.0  # likewise, of those that leave a queue together
UNCHECKED = "LCR"  # the rule of the paper's artifact, which does not look at the load after a move


class Pair(NamedTuple):
    """A move to be made: one request, which the source chooses (policy/request_choice)."""

    source: InstanceId
    destination: InstanceId
    rule: str = ""  # by which the source chooses, a key of select.RULES; "": as it is configured


# Says of a pair whether it may be named now: a move of it may be under way, or have just failed.
Allowed = Callable[[Pair], bool]
# A rule of rescheduling: the moves of one round, the most urgent first.
Planner = Callable[[ClusterView, Terms, Allowed], list[Pair]]


def is_draining(view: ClusterView, info: InstanceInfo) -> bool:
    """Whether an instance's requests are to leave it: it drains, or its node does."""
    return (
        info.state is InstanceState.DRAINING
        or info.id in view.draining
        or info.node in view.draining
    )


def pairs(
    view: ClusterView,
    terms: Terms = TERMS,
    allowed: Allowed = lambda pair: True,
) -> list[Pair]:
    """The moves of one round, the most urgent first; an instance is in one of them at most.

    `allowed` says of a pair whether it may be named now; if not, the source is paired with the next
    best. Instances without a known load are left out, and moves stay within one model, one block
    size and one role (of an instance that drains, also into the role `any`).
    """
    free = {
        i: -inf
        if is_draining(view, view.instances[i])
        else freeness(view.instances[i], load, terms.classes)
        for i, load in view.loads.items()
        if i in view.instances
    }
    thresholds = terms.thresholds
    # What an instance that drains must put somewhere goes also where a class keeps room.
    bare = {i: freeness(view.instances[i], view.loads[i]) for i in free}
    rising = sorted(free, key=lambda i: (free[i], i))
    open_ones = [i for i in rising if is_candidate(view, view.instances[i])]
    takers = open_ones[::-1]
    drain_takers = sorted(open_ones, key=lambda i: (bare[i], i), reverse=True)
    found: list[Pair] = []
    taken: set[InstanceId] = set()
    for source in rising:
        if source in taken or not _gives(view, source, free[source], thresholds):
            continue
        drains = free[source] == -inf
        there = bare if drains else free
        for taker in drain_takers if drains else takers:
            if not _is_worth_it(free[source], there[taker], thresholds):
                break  # nor are those after it, which are less free
            pair = Pair(source, taker)
            if taker not in taken and source != taker and fit(view, pair) and allowed(pair):
                found.append(pair)
                taken.update((source, taker))
                break
    return found


def room(view: ClusterView, pair: Pair, terms: Terms = TERMS) -> Room | None:
    """What the destination of a pair can take now; None when one of both, or its load, is gone.

    Its floor is what keeps requests from going to and fro: after the move the destination is freer
    than the source was before it, by the gain that is wanted. So the lower of the two freenesses
    rises with every move, and there is no way back. For one that drains there is none.
    """
    source, destination = view.instances.get(pair.source), view.instances.get(pair.destination)
    given, load = view.loads.get(pair.source), view.loads.get(pair.destination)
    if source is None or destination is None or given is None or load is None:
        return None
    drains = is_draining(view, source)
    classes = NO_CLASSES if drains else terms.classes
    headroom = classes.added(destination, load.priorities)
    batch = load.running + (1 if load.waiting else 0)
    if pair.rule in (SPILL, QUEUE):  # it is to begin at once, and nobody is to be preempted for it
        kept = terms.classes.headroom(destination, load.priorities)
        floor = SPILL_FLOOR if pair.rule == SPILL else START_FLOOR
        free = unclaimed(destination, load) - kept
        return Room(free, batch, floor, headroom, places(destination, load))
    if pair.rule == TAIL:  # half of what the one lacks more than the other evens them out
        more = unclaimed(destination, load) - unclaimed(source, given)
        return Room(max(more, 0) // 2)
    if pair.rule == UNCHECKED:
        return Room(destination.total_blocks - load.used_blocks, headroom=headroom)
    floor = freeness(source, given, classes) + terms.thresholds.min_gain
    return Room(
        blocks=destination.total_blocks - virtual_usage(destination, load, classes),
        batch=batch,
        floor=-inf if drains else floor,
        headroom=headroom,
        places=inf if drains else places(destination, load),
    )


def _gives(view: ClusterView, instance: InstanceId, free: float, thresholds: Thresholds) -> bool:
    """Whether an instance has something to give away, and reason to."""
    info, load = view.instances[instance], view.loads[instance]
    if info.state is InstanceState.STARTING or info.total_blocks == 0:
        return False
    requests = load.running + load.waiting
    # A request that is alone shares its memory with nobody, and would have no more elsewhere.
    return requests > 0 if free == -inf else requests > 1 and free < thresholds.out_below


def _is_worth_it(source: float, destination: float, thresholds: Thresholds) -> bool:
    if source == -inf:
        return destination > thresholds.drain_above
    return destination > thresholds.in_above and destination - source >= thresholds.min_gain


def fit(view: ClusterView, pair: Pair) -> bool:
    """Whether a request of the one can go on at the other."""
    source, destination = view.instances[pair.source], view.instances[pair.destination]
    alike = (source.model, source.block_size) == (destination.model, destination.block_size)
    spare = is_draining(view, source) and destination.role == "any"
    return alike and (source.role == destination.role or spare)


def leaving(
    pair: Pair,
    candidates: Iterable[MovableRequest],
    view: ClusterView,
    terms: Terms,
    rule: str,
    drains: bool = False,
    blocks: float = inf,
) -> MovableRequest | None:
    """The request that goes to the destination; None when none can.

    The pair's own rule counts before `rule`, which is the one that is configured. `blocks` is what
    the leader has kept there for it, which may be less than this view shows to be free.

    Raises:
        LookupError: the view lacks one of both instances, or its load.
        ValueError: there is no rule of that name.
    """
    # A drain asks for room and for nothing else, also if this view does not show it yet.
    free = _known_room(view, pair, replace(terms, classes=NO_CLASSES) if drains else terms, blocks)
    if drains:
        return choose(candidates, DRAIN_RULE, free._replace(floor=-inf))
    return choose(candidates, pair.rule or rule, free)


def leaving_together(
    pair: Pair,
    candidates: Iterable[MovableRequest],
    view: ClusterView,
    terms: Terms,
    count: int,
    blocks: float,
) -> list[MovableRequest]:
    """The queued requests that go to the destination together, by the pair's rule.

    They are `count` at most, and ask for no more than `blocks`: of the room there the leader may
    have promised some to others, which this node's view does not show yet.

    Raises:
        LookupError: the view lacks one of both instances, or its load.
    """
    return choose_together(candidates, pair.rule, _known_room(view, pair, terms, blocks), count)


def _known_room(view: ClusterView, pair: Pair, terms: Terms, blocks: float) -> Room:
    """What the destination can take, of which `blocks` at most may be used."""
    free = room(view, pair, terms)
    if free is None:
        raise LookupError(f"the load of {pair.source} or {pair.destination} is not known")
    return free._replace(blocks=min(free.blocks, blocks))
