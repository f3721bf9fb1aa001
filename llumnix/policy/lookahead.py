"""Rescheduling that looks at queues first: what waits where it does not fit goes where it fits now.

The paper's rule (policy/rebalance) moves running requests away from a full instance until the head
of its queue fits, and so long all others wait behind that head. But a queued request has no KV
cache: to move it costs a message. So where the head of a queue is blocked, those behind it go, the
first come first, to instances without a queue. The head itself stays, and gets room by the paper's
rule: a long prompt holds up all that decode beside it, and here fewer and fewer do.

All the rest is as in the paper.
"""

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceLoad
from llumnix.policy.board import is_candidate
from llumnix.policy.load import unclaimed
from llumnix.policy.rebalance import SPILL, Allowed, Pair, fit, pairs, room
from llumnix.policy.terms import Terms


def lookahead(view: ClusterView, terms: Terms, allowed: Allowed) -> list[Pair]:
    """The moves of one round (a `rebalance.Planner`)."""
    known = [
        (info, load)
        for i, load in view.loads.items()
        if (info := view.instances.get(i)) is not None and is_candidate(view, info)
    ]
    takers = sorted((-unclaimed(info, load), info.id) for info, load in known if not load.waiting)
    blocked = sorted((-load.waiting, info.id) for info, load in known if _holds_up(info, load))
    found: list[Pair] = []
    taken: set[InstanceId] = set()
    for _, source in blocked:
        for _, taker in takers:
            pair = Pair(source, taker, SPILL)
            if taker not in taken and _has_room(view, pair, terms) and allowed(pair):
                found.append(pair)
                taken.update((source, taker))
                break
    return found + [p for p in pairs(view, terms, allowed) if taken.isdisjoint(p[:2])]


def _holds_up(info: InstanceInfo, load: InstanceLoad) -> bool:
    """Whether the head of a queue does not fit, and others wait behind it."""
    return load.waiting > 1 and load.head_blocks > info.total_blocks - load.used_blocks


def _has_room(view: ClusterView, pair: Pair, terms: Terms) -> bool:
    """Whether the taker can begin at once with one of those behind the head, as large as most."""
    load = view.loads[pair.source]
    behind = (load.waiting_blocks - load.head_blocks) / (load.waiting - 1)
    free = room(view, pair, terms)
    return fit(view, pair) and free is not None and free.fits(behind)
