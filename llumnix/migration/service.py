"""The migrations of a node as a whole: what operators, the leader and other nodes ask for.

Lives on the node's event loop. `Departures` and `Arrivals` are the two sides of a move, the actor
admits and records it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from llumnix.actors.base import Handle
from llumnix.actors.manager import MoveCommand, Outcome
from llumnix.cluster import ClusterView, InstanceId, NodeId
from llumnix.dataplane.exchange import Exchange
from llumnix.engine.base import EngineError
from llumnix.migration.actor import MigrationActor
from llumnix.migration.departures import Departures, Rules
from llumnix.migration.destination import Arrivals
from llumnix.migration.errors import BLAMELESS, MigrationError, kind_of
from llumnix.migration.messages import (
    Listed,
    ListedRequest,
    ListRequests,
    Move,
    MoveWaiting,
    R,
    Step,
    ask,
    serve,
)
from llumnix.migration.transfer_groups import Groups, Meetings
from llumnix.policy.request_choice import TOGETHER

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
        await self._departures.close()
        await self._meetings.close()
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
        step = Move(destination, "operator", found[0]["id"])
        made = await self.command(found[0]["node"], found[0]["instance"], step)
        report: dict[str, Any] = msgspec.to_builtins(made)
        return report

    async def carry_out(self, command: MoveCommand) -> Outcome:
        """Have a source move what this node commands as the leader."""
        node, source, blocks = command.source_node, command.source, command.blocks
        what = command.destination, command.reason
        try:
            if command.rule in TOGETHER:
                many = MoveWaiting(*what, command.epoch, command.rule, command.count, blocks)
                made = await self.command(node, source, many)
                return Outcome(requests=made.requests, blocks=made.blocks)
            one = Move(*what, epoch=command.epoch, rule=command.rule, blocks=blocks)
            await self.command(node, source, one)
            return Outcome()
        except EngineError as error:
            return Outcome(str(error), kind_of(error) in BLAMELESS)

    async def command(self, node: NodeId, source: InstanceId, step: Step[R]) -> R:
        """Have a source move one request, or several that wait. Raises MigrationError."""
        try:
            return await ask(self._exchange, node, source, step, MIGRATE_SECONDS)
        except TimeoutError as error:
            raise MigrationError(f"node {node} did not say what became of the move") from error

    async def _list(self, instance: InstanceId, step: ListRequests) -> Listed:
        """The requests of this node's instances, for the node that lists all."""
        return Listed(
            [
                ListedRequest(
                    id=request.request_id,
                    instance=hosted.id,
                    node=self._exchange.node,
                    state="running" if request.started else "waiting",
                    tokens=request.tokens,
                    generated=request.position,
                    priority=request.priority,
                    stuck=request.stuck,
                )
                for hosted in self._exchange.hosted.values()
                for request in hosted.requests
            ]
        )
