"""Rescheduling that looks at queues first: what waits where it does not fit goes where it fits now.

The paper's rule (policy/rebalance) moves running requests away from a full instance until the head
of its queue fits. But a queued request has no KV cache: to move it costs a message. So:

1. Where the head of a queue is blocked, those behind it go, the first come first, to instances that
   have room for them at once and no queue of their own.
2. When nobody is behind it, the head gets room where it is (de-fragmentation): running requests
   leave, no more of them than it takes, each to where the most room is. The head itself stays: a
   long prompt holds up all that decode beside it, and here fewer and fewer do.
3. Else instances are balanced as in the paper.
"""

from dataclasses import dataclass

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceLoad
from llumnix.policy.board import is_candidate
from llumnix.policy.rebalance import SPILL, Allowed, Pair, fit, pairs, spare_blocks
from llumnix.policy.terms import Terms

MAKE_ROOM = "fill"  # the rule by which the source chooses whom to send away for the head's sake


@dataclass(slots=True, eq=False)
class _Side:
    """An instance in this round."""

    info: InstanceInfo
    load: InstanceLoad
    spare: int  # blocks that neither hold anything nor are asked for by its own queue

    @property
    def blocked(self) -> bool:
        """Whether the head of its queue does not fit."""
        return self.load.head_blocks > self.info.total_blocks - self.load.used_blocks


def lookahead(view: ClusterView, terms: Terms, allowed: Allowed) -> list[Pair]:
    """The moves of one round (a `rebalance.Planner`)."""
    sides = [
        _Side(info, load, spare_blocks(info, load, terms.classes))
        for i, load in view.loads.items()
        if (info := view.instances.get(i)) is not None and is_candidate(view, info)
    ]
    takers = sorted((s for s in sides if not s.load.waiting), key=lambda s: (-s.spare, s.info.id))
    blocked = sorted((s for s in sides if s.blocked), key=lambda s: (-s.load.waiting, s.info.id))
    found: list[Pair] = []
    taken: set[InstanceId] = set()
    for source in blocked:
        for taker in takers:
            rule = _rule(source, taker)
            pair = Pair(source.info.id, taker.info.id, rule)
            if rule and taker.info.id not in taken and fit(view, pair) and allowed(pair):
                found.append(pair)
                taken.update(pair[:2])
                break
    rest = [p for p in pairs(view, terms, allowed) if taken.isdisjoint(p[:2])]
    return found + rest


def _rule(source: _Side, taker: _Side) -> str:
    """What the one can do for the other; nothing if that has no room."""
    load = source.load
    if load.waiting > 1:
        behind = (load.waiting_blocks - load.head_blocks) / (load.waiting - 1)
        if taker.spare >= behind:
            return SPILL
    return MAKE_ROOM if taker.spare > 0 else ""
