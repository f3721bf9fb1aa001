"""One client's connection: aiohttp's, and what has to be seen below HTTP that it does not see."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a connection may take, in seconds."""

    send_timeout: float = 300.0  # for which its client may read nothing of an answer; 0: for ever


class Connection(web.RequestHandler):
    """Ends at once with its client, also while its send buffer is full.

    A client that closes its side before it has its answer is gone, though it might go on reading:
    those that have left look the same. asyncio would keep such a connection for as long as the
    other kernel says that it has no room for what is in the send buffer.
    """

    __slots__ = ("_limits", "_stuck", "_wire", "busy")

    def __init__(self, manager: web.Server, limits: Limits, **options: Any) -> None:
        super().__init__(manager, **options)
        self._limits = limits
        self._stuck: asyncio.TimerHandle | None = None
        self.busy = False  # while a request is being answered
        self._wire: asyncio.Transport | None = None  # aiohttp forgets its own when it closes it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._wire = cast(asyncio.Transport, transport)  # uvloop's are none by their class
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is no more."""
        self._wire = None
        self._unstick()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """The client has closed its side: what it has asked for ends."""
        if self._wire is None:
            return
        if self.busy:
            self._wire.abort()
        elif self._stuck is None:  # asyncio closes it when all has been sent
            self._expect()

    def pause_writing(self) -> None:
        """The send buffer is full."""
        super().pause_writing()
        self._expect()

    def resume_writing(self) -> None:
        """The client has read again."""
        super().resume_writing()
        self._unstick()

    def _expect(self) -> None:
        """Wait for the client to read."""
        if self._limits.send_timeout:
            within = self._limits.send_timeout
            self._stuck = asyncio.get_running_loop().call_later(within, self._cut_off)

    def _unstick(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _cut_off(self) -> None:
        if self._wire is None:
            return
        logger.info(
            "client %s is cut off: it has read nothing of its answer for %g s",
            *(self._wire.get_extra_info("peername"), self._limits.send_timeout),
        )
        self._wire.abort()  # close() would wait for what it does not read


class Doors(web.Server):
    """Makes a Connection for each client that comes."""

    def __init__(self, inner: web.Server, limits: Limits, **options: Any) -> None:
        """`inner`: an application's server, whose handler answers here; `options` are aiohttp's."""
        super().__init__(
            self._handle, request_factory=inner.request_factory, handler_cancellation=True
        )
        self._answer = inner.request_handler
        self._limits = limits
        self._options = options

    def __call__(self) -> Connection:
        """A connection, for the socket that has just been accepted."""
        loop = asyncio.get_running_loop()
        return Connection(self, self._limits, loop=loop, **self._options)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.busy = True
        try:
            return await self._answer(request)
        finally:
            connection.busy = False
