"""What an API server in a process of its own asks of its node, as calls of procedures there."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from llumnix.cluster import ClusterView, InstanceId, NodeId
from llumnix.dataplane.exchange import Exchange
from llumnix.engine.base import EngineError
from llumnix.node.api_servers.process_metrics import scrape_files
from llumnix.server.operations import OperationError, Operations

REQUESTS, MIGRATE, DRAIN = "api.requests", "api.migrate", "api.drain"
SCRAPE, TRIED = "api.scrape", "api.tried"
OPEN = "api.open"  # which a node asks of its API servers
CALL_SECONDS = 30.0
MIGRATE_SECONDS = 90.0  # more than the node gives a move


class Answer(msgspec.Struct, frozen=True):
    """What an operation has come to, or why it has not: an HTTP status, and one sentence."""

    result: Any = None
    status: int = 200
    sentence: str = ""


def serve_host(
    exchange: Exchange,
    operations: Operations,
    scrape: Callable[[], Awaitable[bytes]],
    tried: Callable[[], None],
) -> None:
    """Have a node's API servers call it. `scrape`: the metrics of the node's own process; `tried`:
    called when one of them has opened its frontend, or could not."""

    def answering(operation: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Answer]]:
        async def procedure(instance: InstanceId, *arguments: Any) -> Answer:
            try:
                return Answer(await operation(*arguments))
            except OperationError as error:
                return Answer(status=error.status, sentence=str(error))

        return procedure

    async def note() -> None:
        tried()

    exchange.own_procedures |= {
        REQUESTS: answering(operations.requests),
        MIGRATE: answering(operations.migrate),
        DRAIN: answering(operations.drain),
        SCRAPE: answering(scrape),
        TRIED: answering(note),
    }


class HostCalls:
    """The node, as its API servers in other processes call it."""

    def __init__(self, exchange: Exchange, node: NodeId, view: Callable[[], ClusterView]) -> None:
        self._exchange = exchange
        self._node = node
        self.view = view  # of the cluster, as the node last told of it

    async def requests(self) -> list[dict[str, Any]]:
        """All requests of the cluster. Raises OperationError."""
        found: list[dict[str, Any]] = await self._ask(REQUESTS)
        return found

    async def migrate(self, request_id: str, destination: InstanceId) -> dict[str, Any]:
        """Move a request. Raises OperationError."""
        made: dict[str, Any] = await self._ask(
            MIGRATE, request_id, destination, within=MIGRATE_SECONDS
        )
        return made

    async def drain(self, name: str, cancel: bool) -> None:
        """Begin the drain of a node or an instance, or end it. Raises OperationError."""
        await self._ask(DRAIN, name, cancel)

    async def scrape(self) -> bytes:
        """The metrics of the node's own process. Raises OperationError."""
        return bytes(await self._ask(SCRAPE))

    async def tried(self) -> None:
        """Tell that the frontend has been opened, or could not be. Raises OperationError."""
        await self._ask(TRIED)

    async def _ask(self, procedure: str, *arguments: Any, within: float = CALL_SECONDS) -> Any:
        try:
            fields = await self._exchange.call(self._node, "", procedure, arguments, within)
        except (EngineError, TimeoutError) as error:
            text = f"node {self._node} does not answer: {error or type(error).__name__}"
            raise OperationError(503, text) from error
        answer = msgspec.convert(fields, Answer)
        if answer.status != 200:
            raise OperationError(answer.status, answer.sentence)
        return answer.result


async def scrape_shared(host: HostCalls) -> bytes:
    """The metrics of a whole node: those of all its API servers together, and the node's own."""
    shared, own = await asyncio.gather(asyncio.to_thread(scrape_files), host.scrape())
    return shared + own
