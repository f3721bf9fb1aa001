"""Which request a pair moves: the rule and the room that a move has, put together.

The source of a move decides this, in a live cluster and in the simulator.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import inf

from llumnix.cluster import ClusterView
from llumnix.policy.classes import NO_CLASSES
from llumnix.policy.decision_context import Terms
from llumnix.policy.rebalance import Pair, room
from llumnix.policy.select import DRAIN_RULE, MovableRequest, Room, choose, choose_together


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
    free = _room(view, pair, replace(terms, classes=NO_CLASSES) if drains else terms, blocks)
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
    return choose_together(candidates, pair.rule, _room(view, pair, terms, blocks), count)


def _room(view: ClusterView, pair: Pair, terms: Terms, blocks: float) -> Room:
    """What the destination can take, of which `blocks` at most may be used."""
    free = room(view, pair, terms)
    if free is None:
        raise LookupError(f"the load of {pair.source} or {pair.destination} is not known")
    return free._replace(blocks=min(free.blocks, blocks))
