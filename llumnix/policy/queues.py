"""Rescheduling that looks at queues first: what waits in vain goes where it can begin now.

A queued request has no KV cache: to move it costs a message. Dispatch has decided for each on what
it knew then; this decides again on what has come of it. All else is the paper's rule
(policy/rebalance): running requests leave where there is little room.
"""

from collections.abc import Callable

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceLoad
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch_state import is_candidate
from llumnix.policy.load import unclaimed
from llumnix.policy.rebalance import SPILL, Allowed, Pair, fit, pairs, room
from llumnix.policy.request_choice import QUEUE, TAIL

# Of its blocks, that an engine may keep back from the head of its queue (a watermark).
KEPT_BACK = 0.01
# How much more one must lack than another for its queue to be cut: this share of its memory, and
# so many requests as large as most that wait.
UNEVEN_SHARE, UNEVEN_REQUESTS = 0.1, 4


def queues(view: ClusterView, terms: Terms, allowed: Allowed) -> list[Pair]:
    """The moves of one round (a `rebalance.Planner`): whole queues go where they can begin.

    Where the head of a queue does not fit, those that wait go together to instances without a
    queue, in their order, as many as find room there.

    Where nobody has room for them, all instances are over-full, and what counts is whose queue is
    the longest. Half of what one lacks more than another is taken from the end of its queue. That
    evens both out, so it can't go to and fro; and nothing is done about a difference that chance
    makes.
    """
    return _with_others(from_queues(view, terms, allowed), view, terms, allowed)


def from_queues(view: ClusterView, terms: Terms, allowed: Allowed) -> list[Pair]:
    """The moves of one round that take requests out of queues."""
    known = open_ones(view)
    blocked = longest_first(known, is_blocked)
    if not blocked:
        return []
    found = to_idle_queues(
        known, blocked, QUEUE, lambda p: can_begin(view, p, terms) and allowed(p)
    )
    taken = {instance for pair in found for instance in pair[:2]}
    lacking = sorted((unclaimed(info, load), info.id) for info, load in known)
    for source in blocked:
        pair = Pair(source, lacking[-1][1], TAIL)
        if taken.isdisjoint(pair[:2]) and _is_uneven(view, pair) and allowed(pair):
            found.append(pair)
            taken.update(pair[:2])
    return found


Known = list[tuple[InstanceInfo, InstanceLoad]]


def open_ones(view: ClusterView) -> Known:
    """The instances that may get requests, with their loads."""
    return [
        (info, load)
        for i, load in view.loads.items()
        if (info := view.instances.get(i)) is not None and is_candidate(view, info)
    ]


def longest_first(
    known: Known, blocked: Callable[[InstanceInfo, InstanceLoad], bool]
) -> list[InstanceId]:
    """The instances whose queue is blocked, the longest queue first."""
    queued = sorted((-load.waiting, info.id) for info, load in known if blocked(info, load))
    return [instance for _, instance in queued]


def to_idle_queues(
    known: Known, blocked: list[InstanceId], rule: str, may: Callable[[Pair], bool]
) -> list[Pair]:
    """Each blocked one with the roomiest instance without a queue that may take from it."""
    takers = sorted((-unclaimed(info, load), info.id) for info, load in known if not load.waiting)
    found: list[Pair] = []
    taken: set[InstanceId] = set()
    for source in blocked:
        for _, taker in takers:
            pair = Pair(source, taker, rule)
            if taker not in taken and may(pair):
                found.append(pair)
                taken.update((source, taker))
                break
    return found


def is_blocked(info: InstanceInfo, load: InstanceLoad) -> bool:
    """Whether the head of a queue waits for memory, or for a place in the batch."""
    if not load.waiting:
        return False
    if info.max_running and load.running >= info.max_running:
        return True
    free = info.total_blocks - load.used_blocks
    return load.head_blocks > free - KEPT_BACK * info.total_blocks


def can_begin(view: ClusterView, pair: Pair, terms: Terms) -> bool:
    """Whether the destination can begin with one of those that wait: the head, or one as most."""
    free = room(view, pair, terms)
    if free is None or not fit(view, pair):
        return False
    load = view.loads[pair.source]
    return free.fits(load.head_blocks) or free.fits(behind(load))


def behind(load: InstanceLoad) -> float:
    """Blocks that one of those behind the head asks for, in the mean."""
    if load.waiting < 2:
        return load.head_blocks
    return (load.waiting_blocks - load.head_blocks) / (load.waiting - 1)


def _is_uneven(view: ClusterView, pair: Pair) -> bool:
    """Whether the source lacks so much more than the destination that this is no chance."""
    if pair.source == pair.destination or not fit(view, pair):
        return False
    (source, load), (destination, other) = (
        (view.instances[i], view.loads[i]) for i in (pair.source, pair.destination)
    )
    more = unclaimed(destination, other) - unclaimed(source, load)
    mean = load.waiting_blocks / load.waiting
    return load.waiting > 1 and more > max(
        UNEVEN_SHARE * source.total_blocks, UNEVEN_REQUESTS * mean
    )


def lookahead(view: ClusterView, terms: Terms, allowed: Allowed) -> list[Pair]:
    """The moves of one round (a `rebalance.Planner`): what does not fit goes where it fits now.

    The paper's rule moves running requests away from a full instance until the head of its queue
    fits, and so long all others wait behind that head. So where the head is blocked, those behind
    it go, the first come first, to instances without a queue. The head itself stays, and gets room
    by the paper's rule: a long prompt holds up all that decode beside it, and here fewer and fewer
    do.
    """
    known = open_ones(view)
    blocked = longest_first(known, _holds_up)
    found = to_idle_queues(
        known, blocked, SPILL, lambda p: _has_room(view, p, terms) and allowed(p)
    )
    return _with_others(found, view, terms, allowed)


def _with_others(
    found: list[Pair], view: ClusterView, terms: Terms, allowed: Allowed
) -> list[Pair]:
    """The moves out of queues, and behind them the paper's, of other instances."""
    taken = {instance for pair in found for instance in pair[:2]}
    return found + [p for p in pairs(view, terms, allowed) if taken.isdisjoint(p[:2])]


def _holds_up(info: InstanceInfo, load: InstanceLoad) -> bool:
    """Whether the head of a queue does not fit, and others wait behind it."""
    return load.waiting > 1 and load.head_blocks > info.total_blocks - load.used_blocks


def _has_room(view: ClusterView, pair: Pair, terms: Terms) -> bool:
    """Whether the taker can begin at once with one of those behind the head, as large as most."""
    free = room(view, pair, terms)
    return fit(view, pair) and free is not None and free.fits(behind(view.loads[pair.source]))
