"""The way of a streamed answer to its client, which may read slowly, or not at all.

At most a transport's buffer (64 KiB) and the kernel's are filled ahead of the client. What its
request generates meanwhile is kept as one merged piece by vLLM, and holds nobody else up.
"""

from aiohttp import web
from aiohttp.http import HttpVersion11, StreamWriter


class Outlet:
    """One response that is written piece by piece."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self.response = response
        self._request = request
        self._writer: StreamWriter

    async def open(self) -> None:
        """Send the headers. Raises OSError."""
        if self._request.version < HttpVersion11:
            self.response.force_close()  # its end is the only one that such an answer has
        writer = await self.response.prepare(self._request)
        assert isinstance(writer, StreamWriter)
        self._writer = writer

    async def write(self, data: bytes) -> None:
        """Send a piece; returns once the client is not far behind. Raises OSError."""
        await self._writer.write(data, drain=False)
        if self._request.protocol.writing_paused:  # its connection ends a client that is stuck
            await self._writer.drain()

    async def close(self) -> None:
        """Send the end of the response. Raises OSError."""
        await self.response.write_eof()
