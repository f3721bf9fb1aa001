"""The moves away from this node's instances: each one chosen, checked, made, counted and recorded.

Lives on the node's event loop.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pykka import ActorDeadError

from llumnix import metrics
from llumnix.actors.base import Handle
from llumnix.cluster import ClusterView, InstanceId, InstanceState, kv_blocks
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import HostedRequest
from llumnix.engine.base import EngineDead, EngineError
from llumnix.migration.actor import MigrationActor
from llumnix.migration.errors import Ended, FailureKind, MigrationError, kind_of
from llumnix.migration.messages import Move, Moved, MovedTogether, MoveWaiting, serve
from llumnix.migration.source import Departure, MigrationLimits
from llumnix.migration.transfer_groups import Groups
from llumnix.policy.decision_context import Terms
from llumnix.policy.rebalance import Pair, leaving, leaving_together
from llumnix.policy.request_choice import MovableRequest
from llumnix.tasks import TaskSet

logger = logging.getLogger(__name__)

TIDY_FIRST, TIDY_LONGEST = 0.5, 8.0  # seconds until a record is removed again, doubling
SETTLE_SECONDS = 1.0  # that a move which was made waits for its record to go


@dataclass(frozen=True, slots=True)
class Rules:
    """How this node's migrations are chosen and done."""

    limits: MigrationLimits
    rule: str  # a key of policy.request_choice.RULES
    terms: Terms


class Departures:
    """Moves requests away from this node's instances, as operators and the leader ask."""

    def __init__(
        self,
        exchange: Exchange,
        actor: Handle[MigrationActor],
        groups: Groups,
        view: Callable[[], ClusterView],
        rules: Rules,
        at: Callable[[str], Awaitable[None]],
    ) -> None:
        self._exchange = exchange
        self._actor = actor
        self._groups = groups
        self._view = view
        self._rules = rules
        self._at = at  # told of each step before it is taken; tests stop a migration there
        self._under_way = TaskSet()
        self._stops = False
        serve(exchange, Move, self.move)
        serve(exchange, MoveWaiting, self.move_waiting)

    async def close(self) -> None:
        """Begin nothing more, and end what is under way; the requests stay where they are."""
        self._stops = True
        await self._under_way.close()

    async def move(self, source: InstanceId, step: Move) -> Moved:
        """Move a request away from an instance of this node. Raises MigrationError."""
        hosted = self._source(source, step.epoch)
        if step.request:
            request = hosted.find(step.request)
            if request is None:
                raise Ended(f"request {step.request} is not at instance {source}")
        else:
            request = choose(hosted, step, self._view(), self._rules.terms, self._rules.rule)
        self._check(hosted, request, step.destination)
        request.moving = True  # at once: the next move that is commanded chooses another
        node = self._view().instances[step.destination].node
        departure = Departure(
            uuid.uuid4().hex,
            hosted,
            request,
            step,
            node,
            self._exchange,
            self._actor,
            self._groups,
            self._rules.limits,
            self._at,
        )
        departing = self._under_way.own(self._depart(departure))
        departing.add_done_callback(lambda _: setattr(request, "moving", False))
        try:
            return await departing
        except asyncio.CancelledError:
            if not self._stops:
                raise  # not the migration is ended, but who waits for it
            raise MigrationError(f"node {self._exchange.node} stops") from None

    async def move_waiting(self, source: InstanceId, step: MoveWaiting) -> MovedTogether:
        """Move requests that wait at an instance of this node, all in one go.

        They have no KV cache, so nothing is copied, and no record is kept in etcd: each is handed
        over as it stands, and its API server gives it to the destination in a new epoch, as it
        would after a failure. Nothing is awaited between the choice and the hand-over, so whoever
        has begun is none of them.
        """
        hosted, view = self._source(source, step.epoch), self._view()
        self._check_way(hosted, step.destination)
        blocks = choose_waiting(hosted, step, view, self._rules.terms)
        requests = [found for i in blocks if (found := hosted.find(i)) is not None]
        node = view.instances[step.destination].node
        gone = await hosted.hand_over(requests, step.destination, node)
        metrics.MIGRATIONS.labels(step.reason, "moved", "0").inc(len(gone))
        logger.info(
            "%d requests that waited moved from %s to %s (%s)",
            *(len(gone), source, step.destination, step.reason),
        )
        moved_blocks = sum(blocks[request.request_id] for request in gone)
        return MovedTogether("moved", source, step.destination, len(gone), moved_blocks)

    def _source(self, source: InstanceId, epoch: int) -> HostedInstance:
        """The instance that is to give something away, if that may be asked of it."""
        if self._stops:
            raise MigrationError(f"node {self._exchange.node} stops")
        view = self._view()
        if epoch and epoch < view.leader_epoch:
            metrics.MIGRATION_CONFLICTS.inc()
            raise MigrationError(
                f"epoch {epoch} is over: node {view.leader} leads in epoch {view.leader_epoch}"
            )
        hosted = self._exchange.hosted.get(source)
        if hosted is None:
            raise EngineDead(f"instance {source} is not on node {self._exchange.node}")
        return hosted

    def _check(
        self, hosted: HostedInstance, request: HostedRequest, destination: InstanceId
    ) -> None:
        if destination == hosted.id:
            raise MigrationError(f"request {request.request_id} is at {destination} already")
        self._check_way(hosted, destination)
        if request.moving:
            raise MigrationError(f"request {request.request_id} is moving already")
        if request.stuck is not None:
            raise MigrationError(f"request {request.request_id} can't move: {request.stuck}")

    def _check_way(self, hosted: HostedInstance, destination: InstanceId) -> None:
        info = self._view().instances.get(destination)
        if info is None:
            raise MigrationError(f"there is no instance {destination}")
        if info.state is InstanceState.DRAINING:
            raise MigrationError(f"instance {destination} is about to stop")
        if hosted.facts is None or not hosted.facts.resumes:
            raise MigrationError(f"instance {hosted.id} has a scheduler of its own")

    async def _depart(self, departure: Departure) -> Moved:
        """One migration from its proposal to its end, counted."""
        began = time.monotonic()
        outcome, failure = "aborted", "it was called off"
        source, destination = departure.source.id, departure.step.destination
        request_id, reason = departure.request.request_id, departure.step.reason
        try:
            await departure.propose()
            await departure.run()
            outcome, failure = "moved", ""
        except Ended as error:
            outcome, failure = "ended", str(error)
            raise
        except (EngineError, TimeoutError, ActorDeadError) as error:
            failure = str(error) or "an answer did not come in time"
            raise MigrationError(failure, kind_of(error)) from error
        finally:
            seconds = time.monotonic() - began
            _count(departure, outcome, seconds)
            if failure:
                logger.info("request %s stays at %s: %s", request_id, source, failure)
            # It hears of the end before anything else of this request is proposed.
            told = self._actor.ask(MigrationActor.ended, departure.migration, failure or None)
            tidying = self._under_way.own(self._tidy(told, departure.migration, failure or None))
        await asyncio.wait([tidying], timeout=SETTLE_SECONDS)
        logger.info(
            "request %s moved from %s to %s in %.0f ms (%s)",
            *(request_id, source, destination, seconds * 1e3, reason),
        )
        progress = departure.progress
        return Moved(
            request=request_id,
            source=source,
            destination=destination,
            outcome=outcome,
            seconds=round(seconds, 4),
            stages=progress.stages,
            blocks_sent=progress.blocks_sent,
            blocks_skipped=progress.blocks_skipped,
            bytes_sent=progress.bytes_sent,
        )

    async def _tidy(self, told: Awaitable[bool], migration: str, failure: str | None) -> None:
        """See that a record is removed, which takes as long as etcd is silent."""
        pause = TIDY_FIRST
        while True:
            try:
                if await told:
                    return
            except TimeoutError:
                logger.info("the end of migration %s is not yet in the books", migration)
            except ActorDeadError:  # its successor has the same books
                if self._stops:
                    return  # and the lease takes the record along
            await asyncio.sleep(pause)
            pause = min(2 * pause, TIDY_LONGEST)
            told = self._actor.ask(MigrationActor.ended, migration, failure)


def _count(departure: Departure, outcome: str, seconds: float) -> None:
    progress = departure.progress
    metrics.MIGRATIONS.labels(departure.step.reason, outcome, str(progress.stages)).inc()
    metrics.MIGRATION_SECONDS.observe(seconds)
    metrics.MIGRATION_BLOCKS.labels("sent").inc(progress.blocks_sent)
    metrics.MIGRATION_BLOCKS.labels("skipped").inc(progress.blocks_skipped)
    metrics.MIGRATION_BYTES.labels("sent").inc(progress.bytes_sent)
    metrics.MIGRATION_BYTES.labels("skipped").inc(progress.bytes_skipped)


def candidates(hosted: HostedInstance) -> list[MovableRequest]:
    """Those that may move away from it, in the order in which they came."""
    size = hosted.facts.block_size if hosted.facts else 1
    queue = hosted.order.queue
    inside = frozenset(request.request_id for request in queue)
    waiting = frozenset(request.request_id for request in queue if not request.started)
    head = queue[0].request_id if queue else None  # which may be one that was preempted
    return [
        MovableRequest(
            request=request.request_id,
            priority=request.priority,
            tokens=request.tokens,
            blocks=kv_blocks(request.tokens, size),
            running=request.request_id not in waiting,
            order=order,
            generated=request.position,
            head=request.request_id == head,
            queued=request.request_id in inside,
        )
        for order, request in enumerate(hosted.requests)
        if request.stuck is None and not request.moving
    ]


def choose(
    hosted: HostedInstance, step: Move, view: ClusterView, terms: Terms, rule: str
) -> HostedRequest:
    """The request that goes, by the step's rule or else by `rule`. Raises MigrationError."""
    pair = Pair(hosted.id, step.destination, step.rule)
    drains = step.reason == "drain"
    try:
        chosen = leaving(pair, candidates(hosted), view, terms, rule, drains, step.blocks)
    except (LookupError, ValueError) as error:  # a rule may be another version's
        raise MigrationError(str(error)) from None
    request = hosted.find(chosen.request) if chosen is not None else None
    if request is None:
        raise _no_room(pair)
    return request


def choose_waiting(
    hosted: HostedInstance, step: MoveWaiting, view: ClusterView, terms: Terms
) -> dict[str, int]:
    """Those that wait and find room there: their ids and KV blocks. Raises MigrationError."""
    pair = Pair(hosted.id, step.destination, step.rule)
    try:
        chosen = leaving_together(pair, candidates(hosted), view, terms, step.count, step.blocks)
    except LookupError as error:
        raise MigrationError(str(error)) from None
    if not chosen:
        raise _no_room(pair)
    return {one.request: one.blocks for one in chosen}


def _no_room(pair: Pair) -> MigrationError:
    sentence = f"no request of {pair.source} would fit {pair.destination}"
    return MigrationError(sentence, FailureKind.NO_ROOM)
