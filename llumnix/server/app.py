"""The aiohttp application of a node: its own routes, and vLLM's application behind all others."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from llumnix.engine.vllm.compat import client_errors
from llumnix.server import asgi
from llumnix.server.access_log import shown
from llumnix.server.admission import Admission
from llumnix.server.body_checks.contents import Contents, content
from llumnix.server.door.callers import CALLER
from llumnix.server.door.guard import Guard
from llumnix.server.door.routes import RouteTable
from llumnix.server.drain_routes import Drains
from llumnix.server.engine_requests import Opened, opened
from llumnix.server.errors import (
    RETRY_AFTER,
    Handler,
    error_response,
    has_begun,
    openai_errors,
)
from llumnix.server.frontend import Frontend
from llumnix.server.priority import Priorities
from llumnix.server.request_routes import Moves
from llumnix.server.response_stream import Outlet
from llumnix.server.status_routes import Admin, Standing
from llumnix.server.stored import of_body
from llumnix.server.transport.bodies import Bodies
from llumnix.server.transport.connection import Connection

logger = logging.getLogger(__name__)

CLIENT_ERRORS = client_errors()
SENTENCE = 500  # characters of an application's error that are told


class Gateway:
    """Takes what is not the node's own business to vLLM's application."""

    def __init__(
        self, frontend: Callable[[], Frontend | None], standing: Standing, routes: RouteTable
    ) -> None:
        self._frontend = frontend
        self._routes = routes
        self._standing = standing
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of a client."""
        body = await request.read()
        frontend = self._frontend()
        if frontend is None or not self._standing.admits:
            if not self._known(request, frontend):
                return error_response(404, "Not Found")
            return error_response(503, self._standing.sentence, RETRY_AFTER)
        if (problem := refuse(request, body)) is not None:
            return problem
        with self.answering(request, _goes_on(request)) as asked, of_body(body):
            return await self._answer(frontend, request, body, asked)

    def _known(self, request: web.Request, frontend: Frontend | None) -> bool:
        """Whether there is such a route, as far as can be told now."""
        if frontend is None:
            return self._routes.access(request.path) is not None
        return frontend.has(request.path)

    @contextlib.contextmanager
    def answering(self, request: web.Request, goes_on: bool = False) -> Iterator[Opened]:
        """The context in which the request of this task counts as running.

        All that it opens ends with its client, unless it `goes_on` without.
        """
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        frontend = self._frontend()
        connection = request.protocol if isinstance(request.protocol, Connection) else None
        try:
            with opened() as asked:
                if connection is not None and frontend is not None and not goes_on:
                    connection.on_leaving = partial(asked.abandon, frontend.stop)
                yield asked
        finally:
            if connection is not None:
                connection.on_leaving = None
            self._running.discard(task)

    async def _answer(
        self, frontend: Frontend, request: web.Request, body: bytes, asked: Opened
    ) -> web.StreamResponse:
        if frontend.shapes is not None:
            wrong = await frontend.shapes.problem(request.path, content.get())
            if wrong is not None:
                return error_response(400, wrong)
        scope = asgi.scope_of(request)
        if frontend.streams is not None:
            events = await frontend.streams.open(scope, body)
            if events is not None:
                return await stream(request, events)
        try:
            return await asgi.serve(frontend.app, scope, request, body)
        except RuntimeError as error:  # of Starlette: the handler's own comes as its cause
            if has_begun(request) or not isinstance(error.__cause__, CLIENT_ERRORS):
                raise
            # What was to be streamed can't be, as a response of which no events were kept.
            status = 404 if request.method == "GET" else 400
            return error_response(status, shown(str(error.__cause__), SENTENCE))
        finally:
            if _gone(request) and not _goes_on(request):
                asked.abandon(frontend.end)


def _gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _goes_on(request: web.Request) -> bool:
    """Whether its answer is to be fetched later, so that no client need stay for it."""
    said = content.get()
    asked = isinstance(said, dict) and bool(said.get("background"))
    return asked and request.path.endswith("/responses")


async def stream(request: web.Request, events: AsyncGenerator[str, None]) -> web.StreamResponse:
    """Send server-sent events as they come."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    outlet = Outlet(request, response)
    async with contextlib.aclosing(events):
        await outlet.open()
        async for event in events:
            await outlet.write(event.encode())
        await outlet.close()
    return response


def refuse(request: web.Request, body: bytes) -> web.Response | None:
    """An error for a body that no JSON parser has to see."""
    if request.method != "POST" or request.content_type != "application/json":
        return None
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return error_response(400, f"the request body is not valid UTF-8: {error.reason}")
    return None


@web.middleware
async def _vouch(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Behind the door: a caller that it knows may take long for his answer."""
    if CALLER in request and isinstance(request.protocol, Connection):
        request.protocol.vouch()
    return await handler(request)


@dataclass(frozen=True)
class AppParts:
    """Who answers requests, and who looks at them before."""

    gateway: Gateway
    admin: Admin
    moves: Moves
    drains: Drains
    admission: Admission
    contents: Contents
    priorities: Priorities
    generate: Handler
    peer: tuple[str, Handler]  # path and handler of the links of other nodes
    origins: Middleware
    bodies: Bodies
    door: Guard


def make_app(parts: AppParts) -> web.Application:
    """The application, with every route in its place, behind the door."""

    admin, bodies, drains, moves = parts.admin, parts.bodies, parts.drains, parts.moves

    def guard(handler: Handler) -> Handler:
        inner = parts.admission.guard(parts.priorities.guard(handler))
        return parts.admission.door(bodies.guard(parts.contents.guard(inner)))

    middlewares = [parts.origins, openai_errors, parts.door.middleware, _vouch]
    app = web.Application(client_max_size=parts.contents.body_bytes, middlewares=middlewares)
    own: dict[str, dict[str, Handler]] = {
        "/livez": {"GET": admin.livez},
        "/readyz": {"GET": admin.readyz},
        "/health": {"GET": admin.health},
        "/status": {"GET": admin.status},
        "/metrics": {"GET": admin.metrics},
        "/llumnix/requests": {"GET": moves.requests},
        "/llumnix/migrate": {"POST": bodies.guard(moves.migrate)},
        "/llumnix/drain": {"GET": drains.list, "POST": bodies.guard(drains.drain)},
        "/generate": {"POST": guard(parts.generate)},
        parts.peer[0]: {"GET": parts.peer[1]},
    }
    for path, handlers in own.items():
        for place in parts.door.routes.places(path):
            _add(app.router, place, handlers)
    app.router.add_route("*", "/{path:.*}", guard(parts.gateway.handle))
    return app


def _add(router: web.UrlDispatcher, path: str, handlers: dict[str, Handler]) -> None:
    """A route of llumnix's own, with 405 for every other method, which no other may answer."""

    async def other(request: web.Request) -> web.StreamResponse:
        raise web.HTTPMethodNotAllowed(request.method, handlers)

    for method, handler in handlers.items():
        if method == "GET":
            router.add_get(path, handler)  # and HEAD
        else:
            router.add_route(method, path, handler)
    router.add_route("*", path, other)
