"""Rescheduling that looks at queues first: what waits where it does not fit goes where it fits now.

The paper's rule (policy/rebalance) moves running requests away from a full instance until the head
of its queue fits, and so long all others wait behind that head. But a queued request has no KV
cache: to move it costs a message. So where the head of a queue is blocked, those behind it go, the
first come first, to instances without a queue. The head itself stays, and gets room by the paper's
rule: a long prompt holds up all that decode beside it, and here fewer and fewer do.

All the rest is as in the paper.
"""

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad
from llumnix.policy.decision_context import Terms
from llumnix.policy.queues import behind, longest_first, open_ones, to_idle_queues
from llumnix.policy.rebalance import SPILL, Allowed, Pair, fit, pairs, room


def lookahead(view: ClusterView, terms: Terms, allowed: Allowed) -> list[Pair]:
    """The moves of one round (a `rebalance.Planner`)."""
    known = open_ones(view)
    blocked = longest_first(known, _holds_up)
    found = to_idle_queues(
        known, blocked, SPILL, lambda p: _has_room(view, p, terms) and allowed(p)
    )
    taken = {instance for pair in found for instance in pair[:2]}
    return found + [p for p in pairs(view, terms, allowed) if taken.isdisjoint(p[:2])]


def _holds_up(info: InstanceInfo, load: InstanceLoad) -> bool:
    """Whether the head of a queue does not fit, and others wait behind it."""
    return load.waiting > 1 and load.head_blocks > info.total_blocks - load.used_blocks


def _has_room(view: ClusterView, pair: Pair, terms: Terms) -> bool:
    """Whether the taker can begin at once with one of those behind the head, as large as most."""
    free = room(view, pair, terms)
    return fit(view, pair) and free is not None and free.fits(behind(view.loads[pair.source]))
