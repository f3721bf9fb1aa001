"""The API servers of a node, as the rest of it sees them: one in its own process, or several."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from llumnix.dataplane.hosted_request import Origin
from llumnix.node.api_servers.api_server import ApiServer
from llumnix.server.operations import Operations
from llumnix.server.status_routes import Admin


@dataclass(frozen=True)
class Open:
    """What the clients of a node have open."""

    running: int = 0  # handlers of requests
    requests: list[str] = field(default_factory=list)  # at instances, or on their way there

    @property
    def total(self) -> int:
        """How much it is; 0: nothing."""
        return self.running + len(self.requests)


class ApiServers(Protocol):
    """What takes clients' requests, from the start of a node to its end; lives on its loop."""

    @property
    def tried(self) -> bool:
        """Whether a frontend serves, or could not be opened the first time."""

    def home(self) -> Origin | None:
        """The one that gets the engines' statistics, if any is there."""

    async def listen(self) -> None:
        """Answer HTTP, though no request can be served yet. Raises OSError."""

    def begin(self) -> None:
        """The node has started."""

    def look(self) -> None:
        """The cluster may have changed, or an instance of this node is up."""

    def admit_no_more(self) -> None:
        """The node is stopping: take no new request, and finish those that are open."""

    async def refuse_new(self) -> None:
        """Close the listening sockets; open connections go on."""

    async def close_connections(self) -> None:
        """Close all connections."""

    async def close(self) -> None:
        """End the frontends."""

    async def open(self) -> Open:
        """What the clients have open now."""

    @property
    def requests(self) -> int:
        """How many requests this process has to do with now, roughly."""

    @property
    def fault(self) -> str:
        """What of them has died for good; empty if nothing."""


class OneApiServer:
    """The API server in the node's own process."""

    def __init__(
        self,
        server: ApiServer,
        admin: Admin,
        operations: Operations,
        peer: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> None:
        """`peer` answers the route of other nodes' links."""
        self.server = server
        self._parts = admin, operations, peer
        self.begin = server.begin
        self.look = server.look
        self.admit_no_more = server.admit_no_more
        self.refuse_new = server.refuse_new
        self.close_connections = server.close_connections
        self.close = server.close

    @property
    def tried(self) -> bool:
        """Whether vLLM's frontend serves, or could not be opened the first time."""
        return self.server.opening.tried

    def home(self) -> Origin:
        """Its client."""
        return self.server.client

    async def listen(self) -> None:
        """Answer HTTP. Raises OSError."""
        await self.server.listen(*self._parts)

    async def open(self) -> Open:
        """What its clients have open now."""
        return Open(self.server.gateway.running, list(self.server.client.ledger))

    @property
    def requests(self) -> int:
        """How many of its clients' are open, or have ended with handlers still to end."""
        return self.server.requests

    @property
    def fault(self) -> str:
        """What has died; empty if nothing."""
        return self.server.fault
