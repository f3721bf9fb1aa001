"""The server behind the listening socket: each client that comes gets a Connection, or none."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web
from multidict import CIMultiDictProxy

from llumnix.loop_turns import Turns
from llumnix.metrics import REFUSALS
from llumnix.server.errors import RETRY_SOON, error_response
from llumnix.server.transport.connection import Connection
from llumnix.server.transport.connection_places import Limits, Places
from llumnix.server.transport.departed_clients import Leaving
from llumnix.server.transport.head_checks import problem
from llumnix.server.transport.unfinished_heads import Heads

# What has a place while all others are taken: probes, what operators look at, other nodes.
RESERVED = ("/livez", "/readyz", "/health", "/metrics", "/status")
OWN = "/llumnix/"

BEGINNING = 4  # requests that begin in one turn of the loop: some milliseconds with all they do


class Doors(web.Server):
    """Makes a Connection for each client that comes, within the limits."""

    def __init__(self, inner: web.Server, limits: Limits, **options: Any) -> None:
        """`inner`: an application's server, whose handler answers here; `options` are aiohttp's."""
        super().__init__(
            self._handle,
            request_factory=_without_expect(inner.request_factory),
            handler_cancellation=True,  # a client that goes away ends its request
        )
        self._answer = inner.request_handler
        self._limits = limits
        self._options = options
        self._places = Places(limits)
        self._heads = Heads(limits.head_bytes, limits.heads_budget)
        self._beginning = Turns(BEGINNING)
        self._leaving = Leaving()

    def __call__(self) -> Connection:
        """A connection, for the socket that has just been accepted."""
        return Connection(
            self,
            self._places,
            self._heads,
            self._leaving,
            self._limits,
            loop=asyncio.get_running_loop(),
            **self._options,
        )

    async def watch(self) -> None:
        """Close connections whose time is over, until it is cancelled."""
        period = min(1.0, self._limits.header_timeout / 4, self._limits.idle_timeout / 4)
        while True:
            await asyncio.sleep(period)
            self._places.expire()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(Connection, request.protocol)
        connection.begin()
        try:
            if (refusal := problem(request)) is not None:
                REFUSALS.labels("malformed").inc()
                return refusal
            if not _goes_first(request):
                # Whoever leaves before his turn, as one of a crowd does, costs next to nothing.
                await self._beginning.take()
                if connection.gone:
                    raise asyncio.CancelledError
            if not self._places.reserved(connection) or (
                not _goes_first(request) and self._places.move(connection)
            ):
                return await self._answer(request)
            return await self._answer_reserved(request)
        finally:
            connection.rest()

    async def _answer_reserved(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer on a place that is kept for some, and is to be free again soon."""
        if _goes_first(request):
            response = await self._answer(request)
        else:
            self._places.refuse()
            REFUSALS.labels("connections").inc()
            text = f"{self._limits.connections} connections have requests at this server"
            response = error_response(503, f"{text}; try again soon", RETRY_SOON)
        if not response.prepared:
            response.force_close()
        return response


def _goes_first(request: web.BaseRequest) -> bool:
    """Whether others wait for it: probes, operators, other nodes."""
    return request.path.endswith(RESERVED) or OWN in request.path


def _without_expect(make: Callable[..., web.BaseRequest]) -> Callable[..., web.BaseRequest]:
    """Requests whose clients are asked for the body by whoever reads it, not by the router."""

    def made(message: Any, payload: Any, protocol: Any, *rest: Any) -> web.BaseRequest:
        expected = message.headers.get("Expect")
        if expected is not None and expected.lower() == "100-continue":
            protocol.asks_to_go_on = message.version >= (1, 1)
            headers = message.headers.copy()
            del headers["Expect"]
            message = message._replace(headers=CIMultiDictProxy(headers))
        return make(message, payload, protocol, *rest)

    return made
