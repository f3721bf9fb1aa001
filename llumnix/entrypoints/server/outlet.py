"""The way of a streamed answer to its client, which may read slowly, or not at all.

At most a transport's buffer (64 KiB) and the kernel's are filled ahead of the client. What its
request generates meanwhile is kept as one merged piece by vLLM, and holds nobody else up.
"""

import asyncio
import logging

from aiohttp import web
from aiohttp.http import StreamWriter

logger = logging.getLogger(__name__)


class ClientStuck(ConnectionResetError):
    """A client has read nothing for too long; its connection is closed."""


class Outlet:
    """One response that is written piece by piece."""

    def __init__(
        self, request: web.Request, response: web.StreamResponse, send_timeout: float
    ) -> None:
        """`send_timeout`: seconds for which the client may read nothing at all; 0: for ever."""
        self.response = response
        self._request = request
        self._timeout = send_timeout or None
        self._writer: StreamWriter

    async def open(self) -> None:
        """Send the headers."""
        writer = await self.response.prepare(self._request)
        assert isinstance(writer, StreamWriter)
        self._writer = writer

    async def write(self, data: bytes) -> None:
        """Send a piece; returns once the client is not far behind. Raises ClientStuck, OSError."""
        await self._writer.write(data, drain=False)
        if self._request.protocol.writing_paused:  # a timer for each token would be dear
            await self._caught_up()

    async def close(self) -> None:
        """Send the end of the response. Raises ClientStuck, OSError."""
        await self.response.write_eof()

    async def _caught_up(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._writer.drain()
        except TimeoutError:
            logger.info(
                "client %s is cut off: it has read nothing of its stream for %g s",
                *(self._request.remote, self._timeout),
            )
            if self._request.transport is not None:
                self._request.transport.abort()  # close() would wait for what it does not read
            raise ClientStuck("the client reads nothing") from None
