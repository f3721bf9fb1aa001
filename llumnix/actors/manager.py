"""What the leader decides: which requests move, and how many instances run; and who has it done."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Literal

from llumnix.actors.base import Actor, Handle
from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, NodeId
from llumnix.control.desired import Wish
from llumnix.control.etcd.errors import EtcdError
from llumnix.policy.decision_context import TERMS, Terms
from llumnix.policy.load import freeness
from llumnix.policy.rebalance import Pair, Planner, pairs
from llumnix.policy.request_choice import TOGETHER
from llumnix.policy.rescheduler import DRAIN_MOVES, PATIENCE, MoveOrder, Pace, Rescheduler
from llumnix.policy.scaling import Scaler, ScalingTerms

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MoveCommand:
    """What the leader wants of a source: to move a request, of its own choice."""

    epoch: int  # of the leader; a source that knows a later one refuses
    source: InstanceId
    source_node: NodeId
    destination: InstanceId
    reason: Literal["balance", "drain"]
    rule: str = ""  # by which the source chooses; "": as it is configured
    count: int = 1  # requests; more than one only of those that wait and go together
    blocks: float = inf  # KV blocks that are kept at the destination for it, or for all together

    @property
    def pair(self) -> Pair:
        """The two instances, as `finished` wants them."""
        return Pair(self.source, self.destination, self.rule)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of a command."""

    failure: str = ""  # one sentence; empty if it was carried out
    # Whether the failure says nothing about the pair: the request has ended, or nothing fits there.
    blameless: bool = False
    requests: int = 1  # that were moved
    blocks: int | None = None  # that they have together, if that is known


@dataclass(frozen=True)
class Scaling:
    """How a manager scales."""

    terms: ScalingTerms
    wish: Callable[[Wish], None]  # hands numbers of instances to the node's loop
    clock: Callable[[], float] = time.monotonic


class ManagerActor(Actor):
    """Acts while its node leads; has no timer, but is told of each tick.

    All functions given to it are called on its own thread, and must not block.
    """

    def __init__(
        self,
        leads: Callable[[], int | None],  # the epoch while this node leads
        current: Callable[[], bool],  # whether the view is: else etcd is silent
        command: Callable[[MoveCommand], None],  # hands a command to the node's loop
        terms: Terms = TERMS,
        planner: Planner = pairs,
        drain_moves: int = DRAIN_MOVES,
        patience: int = PATIENCE,
        drains: bool = True,  # whether requests are moved away from instances that drain
        scaling: Scaling | None = None,  # None: the number of instances is left alone
        pace: Pace | None = None,  # None: as a rescheduler has it by default
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._leads = leads
        self._current = current
        self._command = command
        self._terms = terms
        self._patience = patience
        self._clock = clock
        self._new_term = partial(Rescheduler, planner, terms, drain_moves, patience, drains, pace)
        self._rescheduler = self._new_term()
        self._scaling = scaling
        self._scaler = self._new_scaler()
        self._view = ClusterView()
        self._epoch = 0  # in which this node leads, or led last
        self._holds = False

    def update_view(self, view: ClusterView) -> None:
        """Take over a newer snapshot of the cluster, and act at once on queues that it shows.

        What waits in vain and could begin elsewhere is not left waiting for the next tick.
        """
        self._view = view
        if self._leads() == self._epoch and self._current():
            for order in self._rescheduler.urgent(view, self._clock()):
                self._command_all(order)

    def tick(self) -> None:
        """An interval has passed: command what this round asks for, if this node leads."""
        epoch = self._leads()
        if epoch is None:
            return
        if epoch != self._epoch:  # what was under way belongs to another term
            self._epoch, self._rescheduler, self._holds = epoch, self._new_term(), False
            self._scaler = self._new_scaler()
        for pair in self._rescheduler.next_round():
            self._say_failed(pair, f"no answer within {self._patience} intervals")
        if self._may_act():
            for order in self._rescheduler.orders(self._view, self._clock()):
                self._command_all(order)
            self._scale()
        elif self._scaler is not None:
            self._scaler.forget()

    def finished(self, pair: Pair, outcome: Outcome) -> None:
        """A commanded move has ended."""
        made = not outcome.failure
        known = self._rescheduler.finished(
            pair, made, outcome.blameless, outcome.requests, outcome.blocks
        )
        if known and not made:
            self._say_failed(pair, outcome.failure)

    def _may_act(self) -> bool:
        """Whether the view can be trusted. When etcd is silent it is old, and all stays put."""
        holds = not self._current()
        if holds and not self._holds:
            what = "moves nothing" if self._scaling is None else "moves and scales nothing"
            logger.info("epoch %d: %s while etcd is silent", self._epoch, what)
        self._holds = holds
        return not holds

    def _command_all(self, order: MoveOrder) -> None:
        view, pair = self._view, order.pair
        source, destination = view.instances[pair.source], view.instances[pair.destination]
        together = pair.rule in TOGETHER
        many = "up to %d waiting requests" if together else "%d requests"
        logger.info(
            "epoch %d: moves %s from %s (%s) to %s (freeness %.1f)",
            self._epoch,
            "a request" if order.moves == 1 else many % order.moves,
            source.id,
            "drains" if order.drains else f"freeness {self._freeness(source):.1f}",
            destination.id,
            self._freeness(destination),
        )
        for _ in range(1 if together else order.moves):
            self._command(
                MoveCommand(
                    self._epoch,
                    source.id,
                    source.node,
                    destination.id,
                    "drain" if order.drains else "balance",
                    pair.rule,
                    order.moves if together else 1,
                    order.blocks,
                )
            )

    def _new_scaler(self) -> Scaler | None:
        """The scaler of a term: whatever another leader knew of the past, this one does not."""
        if self._scaling is None:
            return None
        return Scaler(self._scaling.terms, self._terms.classes)

    def _scale(self) -> None:
        """Wish for another number of instances, if it is time for that."""
        scaling, view = self._scaling, self._view
        if scaling is None or self._scaler is None:
            return
        decision = self._scaler.decide(view, scaling.clock())
        if decision is None:
            return
        logger.info("epoch %d: %s", self._epoch, decision.sentence)
        seen = {node: view.desired[node] for node in decision.desired if node in view.desired}
        scaling.wish(Wish(self._epoch, decision.desired, seen, decision.victim))

    def _freeness(self, info: InstanceInfo) -> float:
        return freeness(info, self._view.loads[info.id], self._terms.classes)

    def _say_failed(self, pair: Pair, reason: str) -> None:
        logger.info(
            "epoch %d: no request moved from %s to %s: %s; they rest for %d intervals",
            self._epoch,
            pair.source,
            pair.destination,
            reason,
            self._rescheduler.rest(pair),
        )


class Rescheduling:
    """Ticks for the manager actor and carries out what it commands, until it is stopped."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        move: Callable[[MoveCommand], Awaitable[Outcome]],
        put_desired: Callable[[Wish], None],
        interval: float,
    ) -> None:
        self._loop = loop
        self._move = move  # has the source do it, and tells what came of it
        self._put_desired = put_desired  # blocks, as long as etcd's client tries
        self._interval = interval  # seconds
        self._manager: Handle[ManagerActor] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, manager: Handle[ManagerActor]) -> None:
        """Begin to tick for the manager."""
        self._manager = manager
        self._timer = self._loop.call_later(self._interval, self._tick)

    def stop(self) -> None:
        """Stop ticking, and tell the manager of no further outcome."""
        self._manager = None
        if self._timer is not None:
            self._timer.cancel()

    def command(self, command: MoveCommand) -> None:
        """Have a source move a request, as this node leads; called on the manager's thread."""
        asyncio.run_coroutine_threadsafe(self._carry_out(command), self._loop)

    def wish(self, wish: Wish) -> None:
        """Have numbers of instances written, as this node leads; called on the manager's thread.

        What can't be written is logged and dropped: the manager sees what is desired, and wishes
        again.
        """
        asyncio.run_coroutine_threadsafe(self._write(wish), self._loop)

    def _tick(self) -> None:
        if self._manager is not None:
            self._manager.notify(ManagerActor.tick)
            self._timer = self._loop.call_later(self._interval, self._tick)

    async def _write(self, wish: Wish) -> None:
        try:
            await asyncio.to_thread(self._put_desired, wish)
        except EtcdError as error:
            logger.warning("epoch %d: the number of instances stays: %s", wish.epoch, error)
        except Exception:  # nobody else would hear of it
            logger.exception("epoch %d: the number of instances stays", wish.epoch)

    async def _carry_out(self, command: MoveCommand) -> None:
        try:
            outcome = await self._move(command)
        except Exception as error:  # the manager must hear of the end, whatever it is
            logger.exception("a move from %s failed", command.source)
            outcome = Outcome(f"internal error: {type(error).__name__}")
        if self._manager is not None:
            self._manager.notify(ManagerActor.finished, command.pair, outcome)
