"""The supervisor of a node's instances: keeps as many running as are wanted here."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Concatenate

from pykka import ActorDeadError

from llumnix.actors.actor_supervision import Deaths
from llumnix.actors.base import Actor, Handle, P
from llumnix.actors.instance import InstanceActor, Life, Report
from llumnix.cluster import (
    ClusterView,
    InstanceId,
    InstanceInfo,
    InstanceState,
    NodeId,
    instance_name,
)
from llumnix.dataplane.hosted_instance import HostedInstance

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What the supervisor calls, from its own thread, to act on the node."""

    loop: asyncio.AbstractEventLoop
    make: Callable[[InstanceId, int], HostedInstance]  # a new engine in a slot; on the loop
    requests: Callable[[InstanceId], int]  # how many an instance has
    announce: Callable[[InstanceInfo], None]
    withdraw: Callable[[InstanceId], None]
    tell: Callable[[int, Report], None]  # the supervisor that lives now, of a slot's change
    give_up: Callable[[str], None]  # this node, with a sentence


@dataclass
class _Slot:
    instance: InstanceId
    actor: Handle[InstanceActor]
    report: Report
    kept: bool = False  # is to go on, though the report still says that it drains

    @property
    def wanted(self) -> bool:
        return self.kept or self.report.life not in (Life.DRAINING, Life.STOPPED)


@dataclass
class Roster:
    """The instances of a node and how many are wanted; it outlives the supervisor's actor."""

    slots: dict[int, _Slot] = field(default_factory=dict)
    wanted: int = 0
    initial: int = 0  # instances that the node was started for
    without: InstanceId | None = None  # which one is to go first
    desired: int | None = None  # the value under desired/<node> acted on last
    draining: bool = False  # all of them, as the node is about to stop
    deaths: Deaths = field(default_factory=Deaths)  # of instances' actors


class NodeActor(Actor):
    """Starts and drains instances until the wanted number runs, each in a slot of its own."""

    def __init__(
        self,
        node: NodeId,
        model: str,
        limit: int,
        drain_timeout: float,
        around: Surroundings,
        roster: Roster | None = None,
    ) -> None:
        super().__init__()
        self._node = node
        self._model = model
        self._limit = limit
        self._drain_timeout = drain_timeout
        self._around = around
        self._roster = roster if roster is not None else Roster()

    def on_stop(self) -> None:
        """End the actors of the instances."""
        for slot in self._roster.slots.values():
            slot.actor.end()

    def update_view(self, view: ClusterView) -> None:
        """Act on desired/<node> when an operator, or the leader, has changed it.

        When it is gone, what runs goes on, and is at least what the node was started for: so the
        leader counts, too.
        """
        roster, desired = self._roster, view.desired.get(self._node)
        if desired is not None and desired != roster.desired:
            logger.info("%d instances are desired on this node, by its key in etcd", desired)
            self.want(desired, view.without.get(self._node))
        elif desired is None and roster.desired is not None and roster.wanted < roster.initial:
            logger.info("no number is desired any more, so %d instances run", roster.initial)
            self.want(roster.initial)
        roster.desired = desired

    def want(self, number: int, without: InstanceId | None = None) -> None:
        """Have this many instances run here, at most the limit; `without` is to go first."""
        if number > self._limit:
            logger.warning(
                "%d instances are wanted, but --max-instances is %d", number, self._limit
            )
        self._roster.wanted, self._roster.without = min(number, self._limit), without
        self._settle()

    def changed(self, slot: int, report: Report) -> None:
        """An instance's actor reports a change."""
        held = self._roster.slots.get(slot)
        if held is None:
            return
        if not held.wanted and report.life not in (Life.DRAINING, Life.STOPPED):
            # It was on its way when the instance was told to drain, or to drain again.
            self._command(slot, InstanceActor.drain, self._drain_timeout)
            return
        held.report = report
        held.kept = held.kept and report.life is Life.DRAINING
        if report.life is Life.STOPPED:
            del self._roster.slots[slot]
            held.actor.end()
            self._around.withdraw(report.instance)
            logger.info("instance %s has stopped", report.instance)
            self._settle()
            return
        if report.life is Life.READY:
            logger.info("instance %s is ready", report.instance)
        self._announce(report)

    def announce_all(self) -> None:
        """Make all instances known once more."""
        for slot in self._roster.slots.values():
            self._announce(slot.report)

    def drain_all(self) -> None:
        """Announce all instances as draining, as the node is about to stop; start no other."""
        self._roster.draining = True
        for slot in self._roster.slots.values():
            if slot.report.life in (Life.READY, Life.STARTING, Life.BACKING_OFF):
                self._announce(slot.report)

    def halt(self) -> int:
        """Stop all instances now; the number that is still to report STOPPED."""
        self._roster.draining = True
        self._roster.wanted = 0
        for number in self._roster.slots:
            self._command(number, InstanceActor.halt)
        return len(self._roster.slots)

    def look_after(self) -> None:
        """Count an instance whose actor has died as stopped, and fill its slot anew."""
        for number, slot in list(self._roster.slots.items()):
            if not slot.actor.alive:
                self._roster.deaths.count()
                if self._roster.deaths.too_many:
                    self._around.give_up(f"the actor of {slot.instance} dies again and again")
                    return
                reason = "its actor has died"
                self.changed(number, Report(slot.instance, Life.STOPPED, None, reason))

    def take_over(self) -> None:
        """Go on where a predecessor has died: hear from each instance, and settle."""
        for number in list(self._roster.slots):
            self._command(number, InstanceActor.report)
        self.look_after()
        self._settle()

    def left(self) -> int:
        """How many instances have not stopped yet."""
        return len(self._roster.slots)

    def reports(self) -> list[Report]:
        """The last report of each instance, in the order of the slots."""
        return [slot.report for _, slot in sorted(self._roster.slots.items())]

    def _settle(self) -> None:
        """Start, keep or drain what the difference between wanted and running asks for."""
        if self._roster.draining:
            return
        slots, wanted = self._roster.slots, self._roster.wanted
        running = sorted((n for n, slot in slots.items() if slot.wanted), key=self._goes_first)
        for number in running[: max(len(running) - wanted, 0)]:
            self._drain(number)
        draining = sorted((n for n, slot in slots.items() if not slot.wanted), key=self._goes_first)
        for _ in range(wanted - len(running)):
            if draining:
                self._keep(draining.pop())
            elif len(slots) < self._limit:  # else one is free when a draining instance has stopped
                self._open(next(n for n in range(self._limit) if n not in slots))

    def _goes_first(self, number: int) -> tuple[bool, int, int]:
        """Sorts the one that was named first, then by fewest requests, then the youngest."""
        instance = self._roster.slots[number].instance
        return instance != self._roster.without, self._around.requests(instance), -number

    def _drain(self, number: int) -> None:
        slot = self._roster.slots[number]
        logger.info("instance %s drains: %d are wanted", slot.instance, self._roster.wanted)
        # Not chosen again while its actor's own report is on its way.
        slot.report, slot.kept = slot.report._replace(life=Life.DRAINING), False
        self._command(number, InstanceActor.drain, self._drain_timeout)

    def _keep(self, number: int) -> None:
        """Have one that drains go on, if it is not too late; else its slot is filled anew."""
        slot = self._roster.slots[number]
        logger.info("instance %s is kept: %d are wanted", slot.instance, self._roster.wanted)
        slot.kept = True
        self._command(number, InstanceActor.keep)

    def _open(self, number: int) -> None:
        instance = instance_name(self._node, number)
        reference = InstanceActor.start(
            instance,
            lambda: self._around.make(instance, number),
            self._around.loop,
            lambda report: self._around.tell(number, report),
        )
        report = Report(instance, Life.STARTING, None)
        self._roster.slots[number] = _Slot(instance, Handle(reference), report)
        self._command(number, InstanceActor.begin)

    def _command(
        self,
        number: int,
        method: Callable[Concatenate[InstanceActor, P], None],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Tell an instance's actor what to do; one that has died counts as stopped."""
        slot = self._roster.slots[number]
        try:
            slot.actor.tell(method, *args, **kwargs)
        except ActorDeadError:
            if slot.report.life is not Life.STOPPED:  # it is told only once
                slot.report = Report(slot.instance, Life.STOPPED, None, "its actor has died")
                self._handle.tell(NodeActor.changed, number, slot.report)

    def _announce(self, report: Report) -> None:
        facts = report.facts
        state = report.state
        if self._roster.draining:
            state = InstanceState.DRAINING
        self._around.announce(
            InstanceInfo(
                report.instance,
                self._node,
                self._model,
                state,
                facts.total_blocks if facts else 0,
                facts.block_size if facts else 0,
                failed_starts=report.failed_starts,
                max_running=facts.max_running if facts else 0,
            )
        )
