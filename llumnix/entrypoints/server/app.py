"""The aiohttp application of a node: its own routes, and vLLM's application behind all others."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import web

from llumnix.entrypoints.server import asgi
from llumnix.entrypoints.server.admin import Admin, Standing
from llumnix.entrypoints.server.errors import error_response, openai_errors

logger = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "5"}


class Backend(Protocol):
    """What the application stands on."""

    @property
    def asgi_app(self) -> asgi.AsgiApp | None:
        """vLLM's application, once an instance is up."""

    async def generate(self, body: bytes) -> web.StreamResponse | None:
        """The demo server's /generate."""


class Gateway:
    """Takes what is not the node's own business to vLLM's application."""

    def __init__(self, backend: Callable[[], asgi.AsgiApp | None], standing: Standing) -> None:
        self._backend = backend
        self._standing = standing
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of a client."""
        body = await request.read()
        app = self._backend()
        if app is None or not self._standing.serving:
            return error_response(503, self._standing.sentence, RETRY_AFTER)
        if (problem := refuse(request, body)) is not None:
            return problem
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return await asgi.serve(app, request, body)
        finally:
            self._running.discard(task)


def refuse(request: web.Request, body: bytes) -> web.Response | None:
    """An error for a body that no JSON parser has to see."""
    if request.method != "POST" or request.content_type != "application/json":
        return None
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return error_response(400, f"the request body is not valid UTF-8: {error.reason}")
    return None


def make_app(
    gateway: Gateway,
    admin: Admin,
    peer: tuple[str, Callable[[web.Request], Awaitable[web.StreamResponse]]],
    max_body_bytes: int,
) -> web.Application:
    """The application, with every route in its place."""
    app = web.Application(client_max_size=max_body_bytes, middlewares=[openai_errors])
    app.router.add_get(*peer)
    app.router.add_get("/livez", admin.livez)
    app.router.add_get("/readyz", admin.readyz)
    app.router.add_get("/health", admin.health)
    app.router.add_get("/status", admin.status)
    app.router.add_get("/metrics", admin.metrics)
    app.router.add_route("*", "/{path:.*}", gateway.handle)
    return app
