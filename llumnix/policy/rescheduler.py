"""Rescheduling as a whole: in each round, which moves are begun, given those that are under way.

The same object decides for the leader of a live cluster and in the simulator.
"""

from typing import NamedTuple

from llumnix.cluster import ClusterView
from llumnix.policy.moves import Moves
from llumnix.policy.rebalance import Pair, Planner, is_emptied, pairs
from llumnix.policy.terms import TERMS, Terms

DRAIN_MOVES = 4  # at once, from or to an instance, when one is being emptied
PATIENCE = 60  # ticks until a move without an answer counts as failed


class Order(NamedTuple):
    """What one round asks of a pair."""

    pair: Pair
    moves: int  # requests to be moved
    drains: bool  # whether the source is being emptied


class Rescheduler:
    """The decisions of one leader's term; a plain object without threads or clock."""

    def __init__(
        self,
        planner: Planner = pairs,
        terms: Terms = TERMS,
        drain_moves: int = DRAIN_MOVES,
        patience: int = PATIENCE,
        empties: bool = True,
    ) -> None:
        """`empties`: whatever the planner names, instances that are to be emptied give all."""
        self._planner = planner
        self._terms = terms
        self._drain_moves = drain_moves
        self._empties = empties and planner is not pairs  # which names them itself, before others
        self._moves = Moves(patience)

    def next_round(self) -> list[Pair]:
        """An interval has passed; the pairs whose moves got no answer in time, and are given up."""
        return self._moves.next_tick()

    def orders(self, view: ClusterView) -> list[Order]:
        """What this round asks for, the most urgent first; from now on it is under way."""
        made = []
        for pair in self._found(view):
            number = self._further(view, pair)
            if number < 1:
                continue
            for _ in range(number):
                self._moves.begin(pair)
            made.append(Order(pair, number, is_emptied(view, view.instances[pair.source])))
        return made

    def _found(self, view: ClusterView) -> list[Pair]:
        """The pairs by which instances are emptied, and behind them those of the planner.

        That may be another package's, so what it names need not be there.
        """

        def allowed(pair: Pair) -> bool:
            return self._further(view, pair) > 0

        found: list[Pair] = []
        if self._empties and any(is_emptied(view, info) for info in view.instances.values()):
            every = pairs(view, self._terms, allowed)
            found = [p for p in every if is_emptied(view, view.instances[p.source])]
        used = {instance for pair in found for instance in pair[:2]}
        known = view.loads.keys() & view.instances.keys()
        return found + [
            pair
            for pair in self._planner(view, self._terms, allowed)
            if known.issuperset(pair[:2]) and used.isdisjoint(pair[:2])
        ]

    def finished(self, pair: Pair, moved: bool) -> bool:
        """A move of a pair has ended; whether there was one."""
        return self._moves.end(pair, moved)

    def rest(self, pair: Pair) -> int:
        """For how many rounds a pair is to rest after moves that failed."""
        return self._moves.rest(pair)

    def _further(self, view: ClusterView, pair: Pair) -> int:
        """How many more moves of a pair may begin now."""
        if not is_emptied(view, view.instances[pair.source]):
            return self._moves.vacant(pair, limit=1)
        load = view.loads[pair.source]
        left = load.running + load.waiting - self._moves.of(pair.source)
        return min(self._moves.vacant(pair, self._drain_moves), left)
