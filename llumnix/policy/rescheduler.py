"""Rescheduling as a whole: in each round, which moves are begun, given those that are under way.

The same object decides for the leader of a live cluster and in the simulator.
"""

from collections.abc import Set
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from llumnix.cluster import ClusterView, InstanceId
from llumnix.policy.decision_context import TERMS, Terms
from llumnix.policy.moves import MovesUnderWay, Planned
from llumnix.policy.queues import is_blocked
from llumnix.policy.rebalance import Pair, Planner, is_draining, pairs, room
from llumnix.policy.request_choice import TOGETHER

DRAIN_MOVES = 4  # at once, from or to an instance, when one drains
PATIENCE = 60  # ticks until a move without an answer counts as failed
REPEATS = 16  # most times that a round asks its planner what else is to be done


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is done at once, and how soon.

    Raises:
        ValueError: a number is out of range.
    """

    copies: int = 4  # moves of running requests at a time, from and to each instance
    # Seconds that must lie between two rounds, of which one is made as soon as a view shows a
    # queue that could begin elsewhere; 0: rounds are made by the clock alone.
    soonest: float = 0.1
    # Whether what is planned counts in the loads at once, so that a round can plan many moves; and
    # whether a move that failed for want of room, or as its request had ended, is no setback.
    books: bool = True

    def __post_init__(self) -> None:
        if self.copies < 1 or not self.soonest >= 0:
            raise ValueError("a pace is 1 move or more at once, and 0 seconds or more")


# As the paper has it: one move of each instance at once, by the clock alone.
PAPER = Pace(copies=1, soonest=0.0, books=False)


class MoveOrder(NamedTuple):
    """What one round asks of a pair."""

    pair: Pair
    moves: int  # requests to be moved; of those that go together the most
    drains: bool  # whether the source does
    blocks: float = inf  # that may be taken of the destination, for each move, or all together


class Rescheduler:
    """The decisions of one leader's term; a plain object without threads or clock."""

    def __init__(
        self,
        planner: Planner = pairs,
        terms: Terms = TERMS,
        drain_moves: int = DRAIN_MOVES,
        patience: int = PATIENCE,
        drains: bool = True,
        pace: Pace | None = None,
    ) -> None:
        """With `drains`, instances that drain give all they have, whatever the planner names."""
        self._planner = planner
        self._terms = terms
        self._drain_moves = drain_moves
        self._drains = drains and planner is not pairs  # which names them itself, before others
        self._pace = pace or Pace()
        self._moves = MovesUnderWay(patience)
        self._planned = Planned()
        self._last = -inf  # seconds; when the last round was

    def next_round(self) -> list[Pair]:
        """Begin an interval; the pairs whose moves got no answer in time, and are given up."""
        self._planned.next_tick()
        late = self._moves.next_tick()
        for pair in late:
            self._planned.end(pair, 0, 0)
        return late

    def orders(self, view: ClusterView, now: float = 0.0) -> list[MoveOrder]:
        """The moves of this round, the most urgent first; from now on they are under way."""
        self._last = now
        return self._ordered(view, urgent=False)

    def urgent(self, view: ClusterView, now: float) -> list[MoveOrder]:
        """The moves not to be put off: those out of queues that could begin elsewhere."""
        if not self._pace.soonest or now - self._last < self._pace.soonest:
            return []
        if not any(
            is_blocked(i, view.loads[n]) for n, i in view.instances.items() if n in view.loads
        ):
            return []
        self._last = now
        return self._ordered(view, urgent=True)

    def _ordered(self, view: ClusterView, urgent: bool) -> list[MoveOrder]:
        if not self._pace.books:
            return [] if urgent else self._once(view, urgent)
        self._planned.seen(view)
        made: list[MoveOrder] = []
        drained: set[InstanceId] = set()  # and what takes from them, which is enough for a round
        for _ in range(REPEATS):
            more = self._once(self._planned.on(view), urgent, drained)
            if not more:
                break
            made += more
            drained.update(i for order in more if order.drains for i in order.pair[:2])
        return made

    def _once(
        self, view: ClusterView, urgent: bool, without: Set[InstanceId] = frozenset()
    ) -> list[MoveOrder]:
        made = []
        for pair in self._found(view, urgent):
            if not without.isdisjoint(pair[:2]):
                continue
            order = self._order(view, pair)
            if order.moves < 1:
                continue
            for _ in range(1 if pair.rule in TOGETHER else order.moves):
                self._moves.begin(pair)
            if self._pace.books and not order.drains:
                self._planned.begin(pair, *self._expected(view, order))
            made.append(order)
        return made

    def _found(self, view: ClusterView, urgent: bool) -> list[Pair]:
        """The pairs by which instances drain, and behind them those of the planner.

        That may be another package's, so what it names need not be there.
        """

        def allowed(pair: Pair) -> bool:
            return self._further(view, pair) > 0

        found: list[Pair] = []
        drains = any(is_draining(view, info) for info in view.instances.values())
        if self._drains and drains and not urgent:
            every = pairs(view, self._terms, allowed)
            found = [p for p in every if is_draining(view, view.instances[p.source])]
        used = {instance for pair in found for instance in pair[:2]}
        known = view.loads.keys() & view.instances.keys()
        return found + [
            pair
            for pair in self._planner(view, self._terms, allowed)
            if known.issuperset(pair[:2])
            and used.isdisjoint(pair[:2])
            and (not urgent or pair.rule in TOGETHER)
        ]

    def finished(
        self,
        pair: Pair,
        moved: bool,
        blameless: bool = False,
        requests: int = 1,
        blocks: int | None = None,
    ) -> bool:
        """Take note that a move of a pair has ended; whether there was one.

        `requests` is how many went, with so many `blocks` together if that is known. See
        `MovesUnderWay.end` for `blameless`.
        """
        self._planned.end(pair, requests if moved else 0, blocks)
        return self._moves.end(pair, moved, blameless and self._pace.books)

    def rest(self, pair: Pair) -> int:
        """For how many rounds a pair is to rest after moves that failed."""
        return self._moves.rest(pair)

    def _order(self, view: ClusterView, pair: Pair) -> MoveOrder:
        drains = is_draining(view, view.instances[pair.source])
        moves = self._further(view, pair)
        if drains or not self._pace.books:
            return MoveOrder(pair, moves, drains)
        free = room(view, pair, self._terms)
        if free is None:
            return MoveOrder(pair, moves, drains, 0)
        return MoveOrder(pair, int(min(moves, free.places)), drains, max(free.blocks, 0))

    def _expected(self, view: ClusterView, order: MoveOrder) -> tuple[int, int]:
        """How many requests an order moves, and their blocks, if they are as most are."""
        load = view.loads[order.pair.source]
        if order.pair.rule not in TOGETHER:
            mean = load.used_blocks / max(load.running, 1)
            return order.moves, round(min(mean * order.moves, order.blocks))
        mean = max(load.waiting_blocks / max(load.waiting, 1), 1.0)
        number = max(min(load.waiting, int(order.blocks / mean)), 1)
        return number, round(min(mean * number, order.blocks))

    def _further(self, view: ClusterView, pair: Pair) -> int:
        """How many more moves of a pair may begin now."""
        load = view.loads[pair.source]
        if pair.rule in TOGETHER:
            return 0 if self._moves.rest(pair) or self._moves.busy(pair) else load.waiting
        if not is_draining(view, view.instances[pair.source]):
            return min(self._moves.vacant(pair, limit=self._pace.copies), 1)
        left = load.running + load.waiting - self._moves.of(pair.source)
        return min(self._moves.vacant(pair, self._drain_moves), left)
