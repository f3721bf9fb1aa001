"""The migrations of a node as a whole: what operators, the leader and other nodes ask for.

Lives on the node's event loop. `Departures` and `Arrivals` are the two sides of a move, the actor
admits and records it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import msgspec

from llumnix.actors.base import Handle
from llumnix.actors.manager import MoveCommand, Outcome
from llumnix.cluster import ClusterView, InstanceId, NodeId
from llumnix.dataplane.exchange import Exchange
from llumnix.engine.base import EngineError
from llumnix.migration.admission import MigrationActor
from llumnix.migration.departures import Departures, Rules
from llumnix.migration.destination import Arrivals
from llumnix.migration.errors import BLAMELESS, MigrationError, kind_of
from llumnix.migration.meetings import Meetings
from llumnix.migration.messages import (
    Listed,
    ListedRequest,
    ListRequests,
    Move,
    Moved,
    MovedTogether,
    MoveWaiting,
    ask,
    serve,
)
from llumnix.migration.transfer_groups import Groups
from llumnix.policy.select import TOGETHER

logger = logging.getLogger(__name__)

MIGRATE_SECONDS = 60.0  # the longest that a commanded migration may take
LIST_SECONDS = 5.0  # for a node to list its requests


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
        self._view = view
        self._stops = False
        self.at: Callable[[str], Awaitable[None]] = _pass
        self._groups = Groups()
        self._meetings = Meetings(exchange, self._groups, view)
        self._arrivals = Arrivals(exchange, actor, self._reached)
        self._departures = Departures(exchange, actor, self._groups, view, rules, self._reached)
        serve(exchange, ListRequests, self._list)

    def look(self) -> None:
        """The cluster has changed: let instances meet before anything moves between them."""
        if not self._stops:
            self._meetings.look()

    async def close(self) -> None:
        """End what is under way, and begin nothing more; the requests stay where they are."""
        self._stops = True
        self._departures.stop()
        await self._meetings.close()
        await self._departures.close()
        await self._arrivals.close()

    async def _reached(self, step: str) -> None:
        await self.at(step)

    # ---- for operators and the leader ----

    async def requests(self) -> list[dict[str, Any]]:
        """All requests of the cluster, as far as its nodes answer."""
        nodes = sorted(self._view().nodes)
        lists = await asyncio.gather(
            *(ask(self._exchange, node, "", ListRequests(), LIST_SECONDS) for node in nodes),
            return_exceptions=True,
        )
        found: list[dict[str, Any]] = []
        for node, answer in zip(nodes, lists, strict=True):
            if isinstance(answer, EngineError | TimeoutError):
                logger.warning("node %s did not list its requests: %s", node, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found += msgspec.to_builtins(answer.requests)
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
        what = command.reason, "", command.epoch, command.rule, command.count, command.blocks
        step = _step(command.destination, *what)
        try:
            made = await self._command(command.source_node, command.source, step)
        except EngineError as error:
            return Outcome(str(error), kind_of(error) in BLAMELESS)
        if isinstance(made, MovedTogether):
            return Outcome(requests=made.requests, blocks=made.blocks)
        return Outcome()

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
        step = _step(destination, reason, request_id, epoch, rule, count, blocks)
        made: dict[str, Any] = msgspec.to_builtins(await self._command(node, source, step))
        return made

    async def _command(
        self, node: NodeId, source: InstanceId, step: Move | MoveWaiting
    ) -> Moved | MovedTogether:
        try:
            if isinstance(step, Move):  # each by itself, so that the answer's type is known
                return await ask(self._exchange, node, source, step, MIGRATE_SECONDS)
            return await ask(self._exchange, node, source, step, MIGRATE_SECONDS)
        except TimeoutError as error:
            raise MigrationError(f"node {node} did not say what became of the move") from error

    async def _list(self, instance: InstanceId, step: ListRequests) -> Listed:
        """The requests of this node's instances, for the node that lists all."""
        return Listed(
            [
                ListedRequest(
                    id=tenant.request_id,
                    instance=hosted.id,
                    node=self._exchange.node,
                    state="running" if tenant.started else "waiting",
                    tokens=tenant.tokens,
                    generated=tenant.position,
                    priority=tenant.priority,
                    stuck=tenant.stuck,
                )
                for hosted in self._exchange.hosted.values()
                for tenant in hosted.tenants
            ]
        )


def _step(
    destination: InstanceId,
    reason: str,
    request_id: str,
    epoch: int,
    rule: str,
    count: int,
    blocks: float,
) -> Move | MoveWaiting:
    """What the source is told: by some rules requests that wait move together."""
    if rule in TOGETHER:
        return MoveWaiting(destination, reason, epoch, rule, count, blocks)
    return Move(destination, reason, request_id, epoch, rule, blocks)
