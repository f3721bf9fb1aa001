"""An ASGI application behind aiohttp.

aiohttp cancels a handler when its client goes away, so the application is cancelled in the midst
of whatever it does; it never needs to poll for a disconnect.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from aiohttp import web

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# aiohttp frames the body itself.
_NOT_COPIED = frozenset({b"transfer-encoding", b"connection"})


async def serve(
    app: AsgiApp, scope: dict[str, Any], request: web.Request, body: bytes
) -> web.StreamResponse:
    """Have the application answer a request whose body has been read."""
    exchange = _Exchange(request, body)
    await app(scope, exchange.receive, exchange.send)
    if exchange.response is None:
        raise web.HTTPInternalServerError(text="the application gave no answer")
    return exchange.response


def scope_of(request: web.Request) -> dict[str, Any]:
    """The ASGI connection scope of an aiohttp request."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": f"{request.version.major}.{request.version.minor}",
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        "raw_path": request.raw_path.partition("?")[0].encode(),
        "query_string": request.query_string.encode(),
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.raw_headers],
        "client": tuple(peer[:2]) if peer else None,
        "server": (request.url.host, request.url.port),
        "state": {},
    }


class _Exchange:
    """One request and its response."""

    def __init__(self, request: web.Request, body: bytes) -> None:
        self._request = request
        self._body: bytes | None = body
        self._status = 200
        self._headers: list[tuple[bytes, bytes]] = []
        self.response: web.StreamResponse | None = None

    async def receive(self) -> Message:
        if self._body is None:
            # Nothing more comes from this client; if it goes away, this task is cancelled.
            await asyncio.get_running_loop().create_future()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], list(message.get("headers", ()))
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.response is None:
            if not more:
                self.response = self._prepared(web.Response(body=body, status=self._status))
                return
            stream = web.StreamResponse(status=self._status)
            await self._prepared(stream).prepare(self._request)
            self.response = stream
        if body:
            await self.response.write(body)
        if not more:
            await self.response.write_eof()

    def _prepared(self, response: web.StreamResponse) -> Any:
        for name, value in self._headers:
            if name.lower() in _NOT_COPIED or name.lower() == b"content-length":
                continue
            if name.lower() == b"content-type":
                response.headers["Content-Type"] = value.decode("latin-1")
            else:
                response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
        return response
