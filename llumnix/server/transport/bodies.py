"""Where the bodies of requests are read: in bounded time and memory, once their caller is known."""

import asyncio
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from llumnix.metrics import REFUSALS
from llumnix.server.errors import RETRY_SOON, Handler, error_response
from llumnix.server.spans import until_over
from llumnix.server.transport.connection import Connection

FREE = 64 * 1024  # bytes of each body that the budget does not count: most have no more


class Refused(Exception):
    """A body that is not read to its end."""

    def __init__(self, limit: str, status: int, message: str) -> None:
        super().__init__(message)
        self.limit = limit  # for the metrics
        self.status = status


@dataclass(slots=True)
class _Held:
    """What one request holds of the budget."""

    size: int = 0
    unfinished: int = 0  # bytes of what it does not count, while it is read


class Bodies:
    """Reads the body of a request before its handler, which finds it where aiohttp keeps it.

    Bodies are taken as they are: no encoding is undone, as none is by vLLM's own server, and what
    a few bytes would become need not be feared.
    """

    def __init__(self, timeout: float, budget: int) -> None:
        """`timeout`: seconds for a body; `budget`: bytes for all that are open; 0: no limit."""
        self._timeout = timeout
        self._budget = budget
        self.held = 0  # bytes of the budget
        # Of a body that comes in pieces its first ones are free, but not of any number of bodies.
        self._most = budget // 2
        self._unfinished = 0

    def guard(self, handler: Handler) -> Handler:
        """The handler, with an error in its place for a body that can't be had."""

        async def take(request: web.Request) -> web.StreamResponse:
            if not request.body_exists:
                return await handler(request)
            held = _Held()
            try:
                with until_over(partial(self._give_back, held)):
                    request._read_bytes = await self._read(request, held)  # what read() returns
                    return await handler(request)
            except Refused as refused:
                REFUSALS.labels(refused.limit).inc()
                again = RETRY_SOON if refused.limit == "body_budget" else None
                return error_response(refused.status, str(refused), again)

        return take

    def _give_back(self, held: _Held) -> None:
        self.held -= held.size

    async def _read(self, request: web.Request, held: _Held) -> bytes:
        """The body. Raises Refused."""
        encodings = request.headers.getall("Content-Encoding", [])
        if any(encoding.strip().lower() not in ("", "identity") for encoding in encodings):
            text = f"the body must be sent as it is, without Content-Encoding {encodings[0][:40]!r}"
            raise Refused("encoding", 415, text)
        self._see(request, request.content_length or 0)
        content, chunks, size = request.content, [], 0
        try:
            chunk = content.read_nowait()
            if content.at_eof():  # all of it came with its head, as most do
                self._hold(held, len(chunk) - FREE)
                return chunk
            if isinstance(request.protocol, Connection):
                request.protocol.go_on()
            async with asyncio.timeout(self._timeout):
                while True:
                    chunks.append(chunk)
                    size += len(chunk)
                    self._see(request, size)
                    self._hold(held, size - FREE)
                    self._wait(held, min(size, FREE))
                    chunk = await content.readany()
                    if not chunk:
                        break
        except TimeoutError:
            text = f"the request body was not there within {self._timeout:g} s"
            raise Refused("body_time", 408, text) from None
        except web.RequestPayloadError as error:
            text = f"the request body is broken: {str(error).strip().splitlines()[0]}"
            raise Refused("malformed", 400, text) from error
        finally:
            self._unfinished -= held.unfinished
        return b"".join(chunks)

    @staticmethod
    def _see(request: web.Request, size: int) -> None:
        limit = request.client_max_size
        if 0 < limit < size:
            text = f"the request body is larger than the limit of {limit} bytes"
            raise Refused("body", 413, text)

    def _hold(self, held: _Held, size: int) -> None:
        more = size - held.size
        if more <= 0:
            return
        if 0 < self._budget < self.held + more:
            text = f"request bodies of {self._budget} bytes are open at this server"
            raise Refused("body_budget", 429, f"{text}; try again soon")
        held.size += more
        self.held += more

    def _wait(self, held: _Held, size: int) -> None:
        more = size - held.unfinished
        if 0 < self._most < self._unfinished + more:
            text = "too many request bodies are unfinished at this server; try again soon"
            raise Refused("body_budget", 503, text)
        held.unfinished += more
        self._unfinished += more
