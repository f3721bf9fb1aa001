"""The migrations of a node as a whole: what operators, the leader and other nodes ask for.

Lives on the node's event loop. The actor admits and records, `Departure` and `Arrivals` do.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from math import inf, isinf
from typing import Any, TypeVar

from pykka import ActorDeadError

from llumnix import metrics
from llumnix.actors.base import Handle
from llumnix.actors.manager import MoveCommand, Outcome
from llumnix.cluster import ClusterView, InstanceId, InstanceState, NodeId, kv_blocks
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import Tenant
from llumnix.engine.base import EngineDead, EngineError
from llumnix.migration.admission import MigrationActor
from llumnix.migration.candidates import candidates
from llumnix.migration.destination import Arrivals
from llumnix.migration.errors import Ended, MigrationError
from llumnix.migration.failures import is_blameless
from llumnix.migration.meetings import Meetings
from llumnix.migration.source import Departure, Limits
from llumnix.migration.transfer_groups import Groups
from llumnix.migration.waiting_requests import leave_waiting
from llumnix.policy.decision_context import Terms
from llumnix.policy.rebalance import Pair
from llumnix.policy.request_choice import leaving
from llumnix.policy.select import TOGETHER

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIGRATE_SECONDS = 60.0  # the longest that a commanded migration may take
LIST_SECONDS = 5.0  # for a node to list its requests
TIDY_FIRST, TIDY_LONGEST = 0.5, 8.0  # seconds until a record is removed again, doubling
SETTLE_SECONDS = 1.0  # that a move which was made waits for its record to go


@dataclass(frozen=True, slots=True)
class Rules:
    """How this node's migrations are chosen and done."""

    limits: Limits
    rule: str  # a key of policy.select.RULES
    terms: Terms


async def _pass(step: str) -> None:
    """Nothing stops a migration on its way, except in tests."""


class Migrations:
    """Everything about migrations that other parts of the node call."""

    def __init__(
        self,
        exchange: Exchange,
        actor: Handle[MigrationActor],
        view: Callable[[], ClusterView],
        rules: Rules,
    ) -> None:
        self._exchange = exchange
        self._actor = actor
        self._view = view
        self._rules = rules
        self._groups = Groups()
        self._meetings = Meetings(exchange, self._groups, view)
        self._under_way: set[asyncio.Task[Any]] = set()
        self._stops = False
        self.at: Callable[[str], Awaitable[None]] = _pass
        self._arrivals = Arrivals(exchange, actor, lambda step: self.at(step))
        exchange.procedures |= {
            "migrate": self._migrate,
            "migrate_waiting": self._migrate_waiting,
            "requests": self._list,
        }

    def look(self) -> None:
        """The cluster has changed: let instances meet before anything moves between them."""
        if not self._stops:
            self._meetings.look()

    async def close(self) -> None:
        """End what is under way, and begin nothing more; the requests stay where they are."""
        self._stops = True
        await self._meetings.close()
        while self._under_way:  # a migration that ends leaves its record to be removed
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._arrivals.close()

    # ---- for operators and the leader ----

    async def requests(self) -> list[dict[str, Any]]:
        """All requests of the cluster, as far as its nodes answer."""
        nodes = sorted(self._view().nodes)
        lists = await asyncio.gather(
            *(self._exchange.call(node, "", "requests", (), LIST_SECONDS) for node in nodes),
            return_exceptions=True,
        )
        found: list[dict[str, Any]] = []
        for node, answer in zip(nodes, lists, strict=True):
            if isinstance(answer, EngineError | TimeoutError):
                logger.warning("node %s did not list its requests: %s", node, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found += answer
        return found

    async def migrate(self, request_id: str, destination: InstanceId) -> dict[str, Any]:
        """Move a request by hand. Raises MigrationError if that can't be, LookupError if it is not.

        `request_id` may be any part of the id that only one request has, such as what its client
        sent as X-Request-Id.
        """
        if destination not in self._view().instances:
            raise LookupError(f"there is no instance {destination}")
        listed = await self.requests()
        exact = [r for r in listed if r["id"] == request_id]
        found = exact or [r for r in listed if request_id in r["id"]]
        if len(found) != 1:
            many = f"{len(found)} requests have ids with" if found else "there is no request"
            raise LookupError(f"{many} {request_id}")
        return await self.command(
            found[0]["node"], found[0]["instance"], destination, "operator", found[0]["id"]
        )

    async def carry_out(self, command: MoveCommand) -> Outcome:
        """Have a source move what this node commands as the leader."""
        try:
            made = await self.command(
                command.source_node,
                command.source,
                command.destination,
                command.reason,
                epoch=command.epoch,
                rule=command.rule,
                count=command.count,
                blocks=command.blocks,
            )
        except EngineError as error:
            return Outcome(str(error), is_blameless(error))
        return Outcome(requests=made.get("requests", 1), blocks=made.get("blocks"))

    async def command(
        self,
        node: NodeId,
        source: InstanceId,
        destination: InstanceId,
        reason: str,
        request_id: str = "",
        epoch: int = 0,
        rule: str = "",
        count: int = 1,
        blocks: float = inf,
    ) -> dict[str, Any]:
        """Have a source move a request, if none is named one that it chooses by `rule`.

        By some rules it moves `count` requests at once, at most, which wait and have no KV cache.
        They get no more than `blocks` KV blocks at the destination.

        Raises MigrationError. `epoch` is the leader's, 0 if it is no leader who asks.
        """
        room = () if isinf(blocks) else (int(blocks),)
        if rule in TOGETHER:
            procedure: str = "migrate_waiting"
            arguments: tuple[Any, ...] = (destination, reason, epoch, rule, count, *room)
        else:  # nodes of an older version know no rule, and no blocks
            procedure = "migrate"
            further = (rule, *room) if rule or room else ()
            arguments = (request_id, destination, reason, epoch, *further)
        try:
            answer = await self._exchange.call(node, source, procedure, arguments, MIGRATE_SECONDS)
        except TimeoutError as error:
            raise MigrationError(f"node {node} did not say what became of the move") from error
        return dict(answer)

    # ---- what nodes ask of each other ----

    async def _list(self, instance: InstanceId) -> list[dict[str, Any]]:
        return [
            {
                "id": tenant.request_id,
                "instance": hosted.id,
                "node": self._exchange.node,
                "state": "running" if tenant.started else "waiting",
                "tokens": tenant.tokens,
                "generated": tenant.position,
                "priority": tenant.priority,
                "stuck": tenant.stuck,
            }
            for hosted in self._exchange.hosted.values()
            for tenant in hosted.tenants
        ]

    async def _migrate(
        self,
        source: InstanceId,
        request_id: str,
        destination: InstanceId,
        reason: str,
        epoch: int,
        rule: str = "",
        blocks: float = inf,
    ) -> dict[str, Any]:
        """Move a request away from an instance of this node. Raises MigrationError."""
        hosted = self._source(source, epoch)
        if request_id:
            tenant = hosted.find(request_id)
            if tenant is None:
                raise Ended(f"request {request_id} is not at instance {source}")
        else:
            pair = Pair(source, destination, rule)
            tenant = self._choose(hosted, pair, reason == "drain", blocks)
        self._check(hosted, tenant, destination)
        tenant.leaving = True  # at once: the next move that is commanded chooses another
        departing = self._spawn(self._depart(hosted, tenant, destination, reason))
        departing.add_done_callback(lambda _: setattr(tenant, "leaving", False))
        try:
            return await departing
        except asyncio.CancelledError:
            if not self._stops:
                raise  # not the migration is ended, but who waits for it
            raise MigrationError(f"node {self._exchange.node} stops") from None

    async def _migrate_waiting(
        self,
        source: InstanceId,
        destination: InstanceId,
        reason: str,
        epoch: int,
        rule: str,
        count: int,
        blocks: float = inf,
    ) -> dict[str, Any]:
        """Move requests that wait at an instance of this node, all in one go."""
        hosted = self._source(source, epoch)
        self._check_way(hosted, destination)
        pair = Pair(source, destination, rule)
        room = count, blocks
        return await leave_waiting(hosted, pair, reason, self._view(), self._rules.terms, *room)

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
        rules, view = self._rules, self._view()
        terms, rule = rules.terms, rules.rule
        try:
            chosen = leaving(pair, candidates(hosted), view, terms, rule, drains, blocks)
        except (LookupError, ValueError) as error:  # a rule may be another version's
            raise MigrationError(str(error)) from None
        tenant = hosted.find(chosen.request) if chosen is not None else None
        if tenant is None:
            raise MigrationError(f"no request of {hosted.id} would fit {pair.destination}")
        return tenant

    async def _depart(
        self, hosted: HostedInstance, tenant: Tenant, destination: InstanceId, reason: str
    ) -> dict[str, Any]:
        """One migration from its proposal to its end, counted."""
        info = self._view().instances[destination]
        migration = uuid.uuid4().hex
        departure = Departure(
            migration,
            hosted,
            tenant,
            destination,
            info.node,
            self._exchange,
            self._actor,
            self._groups,
            self._rules.limits,
            lambda step: self.at(step),
            drains=reason == "drain",
        )
        began = time.monotonic()
        outcome, failure = "aborted", "it was called off"
        try:
            await self.at("propose")
            await self._actor.ask(
                MigrationActor.propose,
                migration,
                tenant.request_id,
                tenant.epoch,
                hosted.id,
                destination,
                kv_blocks(tenant.tokens, departure.block_size),
                reason,
            )
            await departure.run()
            outcome, failure = "moved", ""
        except Ended as error:
            outcome, failure = "ended", str(error)
            raise
        except (EngineError, TimeoutError, ActorDeadError) as error:
            outcome, failure = "aborted", str(error) or "an answer did not come in time"
            raise MigrationError(failure) from error
        finally:
            seconds = time.monotonic() - began
            self._count(departure, reason, outcome, seconds)
            if failure:
                logger.info("request %s stays at %s: %s", tenant.request_id, hosted.id, failure)
            # It hears of the end before anything else of this request is proposed.
            told = self._actor.ask(MigrationActor.ended, migration, failure or None)
            tidying = self._spawn(self._tidy(told, migration, failure or None))
        await asyncio.wait([tidying], timeout=SETTLE_SECONDS)
        logger.info(
            "request %s moved from %s to %s in %.0f ms (%s)",
            *(tenant.request_id, hosted.id, destination, seconds * 1e3, reason),
        )
        progress = departure.progress
        return {
            "request": tenant.request_id,
            "source": hosted.id,
            "destination": destination,
            "outcome": outcome,
            "seconds": round(seconds, 4),
            "stages": progress.stages,
            "blocks_sent": progress.blocks_sent,
            "blocks_skipped": progress.blocks_skipped,
            "bytes_sent": progress.bytes_sent,
        }

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

    @staticmethod
    def _count(departure: Departure, reason: str, outcome: str, seconds: float) -> None:
        progress = departure.progress
        metrics.MIGRATIONS.labels(reason, outcome, str(progress.stages)).inc()
        metrics.MIGRATION_SECONDS.observe(seconds)
        metrics.MIGRATION_BLOCKS.labels("sent").inc(progress.blocks_sent)
        metrics.MIGRATION_BLOCKS.labels("skipped").inc(progress.blocks_skipped)
        metrics.MIGRATION_BYTES.labels("sent").inc(progress.bytes_sent)
        metrics.MIGRATION_BYTES.labels("skipped").inc(progress.bytes_skipped)
