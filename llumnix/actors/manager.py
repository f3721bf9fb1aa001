"""The leader's rescheduler: which instance gives a request away, to which other, and when."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llumnix.actors.base import Actor
from llumnix.cluster import ClusterView, InstanceId, NodeId
from llumnix.policy.load import freeness
from llumnix.policy.moves import Moves
from llumnix.policy.rebalance import Pair, Thresholds, is_emptied, pairs

logger = logging.getLogger(__name__)

MOVED = "moved"  # the outcome of a move that was made; any other is a reason why it was not
DRAIN_MOVES = 4  # at once, from or to an instance, when one is being emptied
PATIENCE = 60  # ticks until a move without an answer counts as failed


@dataclass(frozen=True, slots=True)
class MoveCommand:
    """What the leader wants of a source: to move a request, of its own choice."""

    epoch: int  # of the leader; a source that knows a later one refuses
    source: InstanceId
    source_node: NodeId
    destination: InstanceId
    destination_node: NodeId
    reason: Literal["balance", "drain"]

    @property
    def pair(self) -> Pair:
        """The two instances, as `finished` wants them."""
        return Pair(self.source, self.destination)


class ManagerActor(Actor):
    """Pairs instances while its node leads; has no timer, but is told of each tick.

    All functions given to it are called on its own thread, and must not block.
    """

    def __init__(
        self,
        leads: Callable[[], int | None],  # the epoch while this node leads
        current: Callable[[], bool],  # whether the view is: else etcd is silent
        command: Callable[[MoveCommand], None],  # hands a command to the node's loop
        thresholds: Thresholds | None = None,
        drain_moves: int = DRAIN_MOVES,
        patience: int = PATIENCE,
    ) -> None:
        super().__init__()
        self._leads = leads
        self._current = current
        self._command = command
        self._thresholds = thresholds or Thresholds()
        self._drain_moves = drain_moves
        self._patience = patience
        self._view = ClusterView()
        self._epoch = 0  # in which this node leads, or led last
        self._moves = Moves(patience)
        self._holds = False

    def update_view(self, view: ClusterView) -> None:
        """Take over a newer snapshot of the cluster."""
        self._view = view

    def tick(self) -> None:
        """An interval has passed: command what this round asks for, if this node leads."""
        epoch = self._leads()
        if epoch is None:
            return
        if epoch != self._epoch:  # what was under way belongs to another term
            self._epoch, self._moves, self._holds = epoch, Moves(self._patience), False
        for pair in self._moves.next_tick():
            self._say_failed(pair, f"no answer within {self._patience} intervals")
        if self._may_act():
            for pair in pairs(self._view, self._thresholds, lambda p: self._further(p) > 0):
                self._order(pair)

    def finished(self, pair: Pair, outcome: str) -> None:
        """A commanded move has ended: MOVED, or why no request was moved."""
        if self._moves.end(pair, moved=outcome == MOVED) and outcome != MOVED:
            self._say_failed(pair, outcome)

    def _may_act(self) -> bool:
        """Whether the view can be trusted. When etcd is silent it is old, and all stays put."""
        holds = not self._current()
        if holds and not self._holds:
            logger.info("epoch %d: moves nothing while etcd is silent", self._epoch)
        self._holds = holds
        return not holds

    def _further(self, pair: Pair) -> int:
        """How many more moves of a pair may begin now."""
        if not is_emptied(self._view, self._view.instances[pair.source]):
            return self._moves.vacant(pair, limit=1)
        load = self._view.loads[pair.source]
        left = load.running + load.waiting - self._moves.of(pair.source)
        return min(self._moves.vacant(pair, self._drain_moves), left)

    def _order(self, pair: Pair) -> None:
        view, number = self._view, self._further(pair)
        source, destination = view.instances[pair.source], view.instances[pair.destination]
        drains = is_emptied(view, source)
        logger.info(
            "epoch %d: moves %s from %s (%s) to %s (freeness %.1f)",
            self._epoch,
            "a request" if number == 1 else f"{number} requests",
            source.id,
            "drains" if drains else f"freeness {freeness(source, view.loads[source.id]):.1f}",
            destination.id,
            freeness(destination, view.loads[destination.id]),
        )
        for _ in range(number):
            self._moves.begin(pair)
            self._command(
                MoveCommand(
                    self._epoch,
                    source.id,
                    source.node,
                    destination.id,
                    destination.node,
                    "drain" if drains else "balance",
                )
            )

    def _say_failed(self, pair: Pair, reason: str) -> None:
        logger.info(
            "epoch %d: no request moved from %s to %s: %s; they rest for %d intervals",
            self._epoch,
            pair.source,
            pair.destination,
            reason,
            self._moves.rest(pair),
        )
