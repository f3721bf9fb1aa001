"""The moves away from this node's instances: each one chosen, checked, made, counted and recorded.

Lives on the node's event loop.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from pykka import ActorDeadError

from llumnix import metrics
from llumnix.actors.base import Handle
from llumnix.cluster import ClusterView, InstanceId, InstanceState, kv_blocks
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import Tenant
from llumnix.engine.base import EngineDead, EngineError
from llumnix.migration.admission import MigrationActor
from llumnix.migration.candidates import candidates
from llumnix.migration.errors import Ended, FailureKind, MigrationError, kind_of
from llumnix.migration.messages import Move, Moved, MovedTogether, MoveWaiting, serve
from llumnix.migration.source import Departure, Limits
from llumnix.migration.transfer_groups import Groups
from llumnix.migration.waiting_requests import move_waiting
from llumnix.policy.decision_context import Terms
from llumnix.policy.rebalance import Pair
from llumnix.policy.request_choice import leaving

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIDY_FIRST, TIDY_LONGEST = 0.5, 8.0  # seconds until a record is removed again, doubling
SETTLE_SECONDS = 1.0  # that a move which was made waits for its record to go


@dataclass(frozen=True, slots=True)
class Rules:
    """How this node's migrations are chosen and done."""

    limits: Limits
    rule: str  # a key of policy.select.RULES
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
        self._under_way: set[asyncio.Task[Any]] = set()
        self._stops = False
        serve(exchange, Move, self.move)
        serve(exchange, MoveWaiting, self.move_waiting)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stops = True

    async def close(self) -> None:
        """End what is under way; the requests stay where they are."""
        self._stops = True
        while self._under_way:  # a migration that ends leaves its record to be removed
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def move(self, source: InstanceId, step: Move) -> Moved:
        """Move a request away from an instance of this node. Raises MigrationError."""
        hosted = self._source(source, step.epoch)
        if step.request:
            tenant = hosted.find(step.request)
            if tenant is None:
                raise Ended(f"request {step.request} is not at instance {source}")
        else:
            pair = Pair(source, step.destination, step.rule)
            tenant = self._choose(hosted, pair, step.reason == "drain", step.blocks)
        self._check(hosted, tenant, step.destination)
        tenant.leaving = True  # at once: the next move that is commanded chooses another
        migration = uuid.uuid4().hex
        departure = self._departure(migration, hosted, tenant, step)
        departing = self._spawn(self._depart(departure, migration, hosted, tenant, step))
        departing.add_done_callback(lambda _: setattr(tenant, "leaving", False))
        try:
            return await departing
        except asyncio.CancelledError:
            if not self._stops:
                raise  # not the migration is ended, but who waits for it
            raise MigrationError(f"node {self._exchange.node} stops") from None

    async def move_waiting(self, source: InstanceId, step: MoveWaiting) -> MovedTogether:
        """Move requests that wait at an instance of this node, all in one go."""
        hosted = self._source(source, step.epoch)
        self._check_way(hosted, step.destination)
        pair = Pair(source, step.destination, step.rule)
        terms, room = self._rules.terms, (step.count, step.blocks)
        return await move_waiting(hosted, pair, step.reason, self._view(), terms, *room)

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

    def _choose(self, hosted: HostedInstance, pair: Pair, drains: bool, blocks: float) -> Tenant:
        view, terms, rule = self._view(), self._rules.terms, self._rules.rule
        try:
            chosen = leaving(pair, candidates(hosted), view, terms, rule, drains, blocks)
        except (LookupError, ValueError) as error:  # a rule may be another version's
            raise MigrationError(str(error)) from None
        tenant = hosted.find(chosen.request) if chosen is not None else None
        if tenant is None:
            sentence = f"no request of {hosted.id} would fit {pair.destination}"
            raise MigrationError(sentence, FailureKind.NO_ROOM)
        return tenant

    async def _depart(
        self,
        departure: Departure,
        migration: str,
        hosted: HostedInstance,
        tenant: Tenant,
        step: Move,
    ) -> Moved:
        """One migration from its proposal to its end, counted."""
        began = time.monotonic()
        outcome, failure = "aborted", "it was called off"
        try:
            await self._propose(departure, hosted, tenant, step)
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
            _count(departure, step.reason, outcome, seconds)
            if failure:
                logger.info("request %s stays at %s: %s", tenant.request_id, hosted.id, failure)
            # It hears of the end before anything else of this request is proposed.
            told = self._actor.ask(MigrationActor.ended, migration, failure or None)
            tidying = self._spawn(self._tidy(told, migration, failure or None))
        await asyncio.wait([tidying], timeout=SETTLE_SECONDS)
        logger.info(
            "request %s moved from %s to %s in %.0f ms (%s)",
            *(tenant.request_id, hosted.id, step.destination, seconds * 1e3, step.reason),
        )
        progress = departure.progress
        return Moved(
            request=tenant.request_id,
            source=hosted.id,
            destination=step.destination,
            outcome=outcome,
            seconds=round(seconds, 4),
            stages=progress.stages,
            blocks_sent=progress.blocks_sent,
            blocks_skipped=progress.blocks_skipped,
            bytes_sent=progress.bytes_sent,
        )

    def _departure(
        self, migration: str, hosted: HostedInstance, tenant: Tenant, step: Move
    ) -> Departure:
        return Departure(
            migration,
            hosted,
            tenant,
            step.destination,
            self._view().instances[step.destination].node,
            self._exchange,
            self._actor,
            self._groups,
            self._rules.limits,
            self._at,
            drains=step.reason == "drain",
        )

    async def _propose(
        self, departure: Departure, hosted: HostedInstance, tenant: Tenant, step: Move
    ) -> None:
        """Have the migration admitted and recorded."""
        await self._at("propose")
        await self._actor.ask(
            MigrationActor.propose,
            departure.migration,
            tenant.request_id,
            tenant.epoch,
            hosted.id,
            step.destination,
            kv_blocks(tenant.tokens, departure.block_size),
            step.reason,
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

    def _spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    def _check(self, hosted: HostedInstance, tenant: Tenant, destination: InstanceId) -> None:
        if destination == hosted.id:
            raise MigrationError(f"request {tenant.request_id} is at {destination} already")
        self._check_way(hosted, destination)
        if tenant.leaving:
            raise MigrationError(f"request {tenant.request_id} is moving already")
        if tenant.stuck is not None:
            raise MigrationError(f"request {tenant.request_id} can't move: {tenant.stuck}")

    def _check_way(self, hosted: HostedInstance, destination: InstanceId) -> None:
        info = self._view().instances.get(destination)
        if info is None:
            raise MigrationError(f"there is no instance {destination}")
        if info.state is InstanceState.DRAINING:
            raise MigrationError(f"instance {destination} is about to stop")
        if hosted.facts is None or not hosted.facts.resumes:
            raise MigrationError(f"instance {hosted.id} has a scheduler of its own")


def _count(departure: Departure, reason: str, outcome: str, seconds: float) -> None:
    progress = departure.progress
    metrics.MIGRATIONS.labels(reason, outcome, str(progress.stages)).inc()
    metrics.MIGRATION_SECONDS.observe(seconds)
    metrics.MIGRATION_BLOCKS.labels("sent").inc(progress.blocks_sent)
    metrics.MIGRATION_BLOCKS.labels("skipped").inc(progress.blocks_skipped)
    metrics.MIGRATION_BYTES.labels("sent").inc(progress.bytes_sent)
    metrics.MIGRATION_BYTES.labels("skipped").inc(progress.bytes_skipped)
