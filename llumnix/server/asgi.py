"""An ASGI application behind aiohttp.

aiohttp cancels a handler when its client goes away. The application is not simply cancelled then:
vLLM's handlers work in tasks of their own, which only the message of a disconnect ends.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from llumnix.server.access_log import shown
from llumnix.server.door.callers import ASKS_FOR_LOAD, SEES_LOAD
from llumnix.server.errors import RETRY_SOON
from llumnix.server.response_stream import Outlet

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# aiohttp frames the body itself.
_NOT_COPIED = frozenset({b"transfer-encoding", b"connection"})

logger = logging.getLogger(__name__)

LAST_SECONDS = 0.5  # for an application to end once it was told that its client is gone


async def serve(
    app: AsgiApp, scope: dict[str, Any], request: web.Request, body: bytes
) -> web.StreamResponse:
    """Have the application answer a request whose body has been read."""
    exchange = _Exchange(request, body)
    answering = asyncio.ensure_future(app(scope, exchange.receive, exchange.send))
    try:
        await asyncio.shield(answering)
    except asyncio.CancelledError:
        exchange.gone.set()
        ended, _ = await asyncio.wait({answering}, timeout=LAST_SECONDS)
        if not ended:
            answering.cancel()
            ended, _ = await asyncio.wait({answering}, timeout=LAST_SECONDS)
        for task in ended:
            task.cancelled() or task.exception()  # whatever it was, nobody waits for it
        raise
    except Exception:
        if not isinstance(exchange.response, web.Response):
            raise
        # The application has worded its answer before it let us know of its bug.
        logger.exception("%s %s failed", shown(request.method), shown(request.path))
    finally:
        answering.cancel()
    if exchange.response is None:
        raise web.HTTPInternalServerError(text="the application gave no answer")
    return exchange.response


def scope_of(request: web.Request) -> dict[str, Any]:
    """The ASGI connection scope of an aiohttp request. Raises HTTPBadRequest for a bad Host."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    withheld = None if request.get(SEES_LOAD, False) else ASKS_FOR_LOAD.encode()
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": f"{request.version.major}.{request.version.minor}",
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        "raw_path": request.raw_path.partition("?")[0].encode(),
        "query_string": request.rel_url.raw_query_string.encode(),
        "root_path": "",
        "headers": [
            (lower, value)
            for name, value in request.raw_headers
            if (lower := name.lower()) != withheld
        ],
        "client": tuple(peer[:2]) if peer else None,
        "server": _server(request),
        "state": {},
    }


def _server(request: web.Request) -> tuple[str, int | None] | None:
    """The name and port by which the client has called this server."""
    try:
        urlsplit(f"//{request.host}")  # as the application will, which minds brackets
        return (request.url.host or "", request.url.port)
    except ValueError as error:
        if "Host" in request.headers:
            raise web.HTTPBadRequest(text="the Host header must be host or host:port") from error
        return None  # the socket's own name, if it is none of a URL


class _Exchange:
    """One request and its response."""

    def __init__(self, request: web.Request, body: bytes) -> None:
        self._request = request
        self._body: bytes | None = body
        self._status = 200
        self._headers: list[tuple[bytes, bytes]] = []
        self.response: web.StreamResponse | None = None
        self._outlet: Outlet | None = None
        self.gone = asyncio.Event()  # when the client is
        self._idle = asyncio.Event()  # while no message is on its way to the client
        self._idle.set()

    async def receive(self) -> Message:
        if self._body is None:
            await self.gone.wait()
            # An application that learns of it cancels what sends. That is to find its generator of
            # tokens waiting for the next one, and not half-way out of here: only then it is closed.
            await self._idle.wait()
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Pass a message on; for a client that is gone, nothing happens.

        An error would leave the application's generator of tokens behind, and its request running:
        the message of a disconnect is what ends it.
        """
        if self.gone.is_set():
            return
        self._idle.clear()
        try:
            await self._send(message)
        except OSError:
            self.gone.set()
        finally:
            self._idle.set()

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], list(message.get("headers", ()))
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._outlet is None:
            if not more:
                self.response = self._prepared(web.Response(body=body, status=self._status))
                return
            self.response = self._prepared(web.StreamResponse(status=self._status))
            self._outlet = Outlet(self._request, self.response)
            await self._outlet.open()
        if body:
            await self._outlet.write(body)
        if not more:
            await self._outlet.close()

    def _prepared(self, response: web.StreamResponse) -> Any:
        for name, value in self._headers:
            if name.lower() in _NOT_COPIED or name.lower() == b"content-length":
                continue
            if name.lower() == b"content-type":
                response.headers["Content-Type"] = value.decode("latin-1")
            else:
                response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
        if self._status == HTTPStatus.SERVICE_UNAVAILABLE:  # which vLLM says without a time
            response.headers.setdefault("Retry-After", RETRY_SOON["Retry-After"])
        return response
