"""Clients that leave, at a server without a node: the application hears of it, and lets go."""

import asyncio
import contextlib
import gc
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from aiohttp import web
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from llumnix.server import asgi, engine_requests
from llumnix.server.app import Gateway
from llumnix.server.door.routes import RouteTable
from llumnix.server.status_routes import Standing
from llumnix.server.transport.connection import UNREAD, Connection
from llumnix.server.transport.connection_places import Limits
from llumnix.server.transport.departed_clients import ENDING
from tests.kit.leaving import SMALL, WAYS, Client, head, post
from tests.kit.loop import soon
from tests.kit.serving import self_signed, serving


class Tokens:
    """An application that streams for ever, and knows what it has open."""

    def __init__(self, piece: int) -> None:
        self.open = 0
        self.begun = 0
        self._piece = "x" * piece
        self.app = Starlette(routes=[Route("/", self._stream, methods=["POST"])])

    async def _stream(self, request: Any) -> StreamingResponse:
        return StreamingResponse(self._tokens())

    async def _tokens(self) -> AsyncIterator[str]:
        self.open += 1
        self.begun += 1
        try:
            while True:
                await asyncio.sleep(0.001)
                yield self._piece
        finally:
            self.open -= 1

    async def handle(self, request: web.Request) -> web.StreamResponse:
        return await asgi.serve(self.app, asgi.scope_of(request), request, await request.read())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("piece", (10, 20_000), ids=("small", "full"))
def test_streams_are_closed(way: str, piece: int) -> None:
    """Not by the garbage collector: a cycle that waits for it would keep requests running."""

    async def check() -> None:
        tokens = Tokens(piece)
        async with serving(tokens.handle) as port:
            for _ in range(3):
                clients = [Client(port, SMALL).send(post("/", {})) for _ in range(30)]
                await soon(lambda: tokens.open == 30)
                await asyncio.sleep(0.05 if piece > 10 else 0)  # until buffers are full
                for client in clients:
                    client.leave(way)
                await soon(lambda: not tokens.open)
                for client in clients:
                    client.close()

    gc.disable()
    try:
        uvloop.run(check())
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ("close", "half"))
def test_those_that_leave_before_their_turn_never_begin(way: str) -> None:
    """A crowd costs no more than its connections; a probe behind it does not wait for its turn."""
    begun: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        begun.append(request.path)
        await asyncio.sleep(60)
        raise AssertionError

    async def check() -> None:
        async with serving(handle) as port:
            crowd = [Client(port).send(post("/", {})) for _ in range(300)]
            for client in crowd:
                client.leave(way)
            probe = Client(port).send(head("GET", "/livez", {}))
            await soon(lambda: "/livez" in begun)
            assert len(begun) < 150
            for client in (*crowd, probe):
                client.close()

    uvloop.run(check())


def test_what_a_crowd_has_asked_for_ends_at_once_and_its_handlers_in_turns() -> None:
    """The others' tokens get through while a hundred handlers unwind."""
    left: list[int] = []
    ended: list[int] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        assert isinstance(request.protocol, Connection)
        request.protocol.on_leaving = lambda: left.append(len(ended))
        begun.append(request)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(1)
        raise AssertionError

    begun: list[web.Request] = []

    async def check() -> None:
        async with serving(handle) as port:
            clients = [Client(port).send(post("/", {})) for _ in range(100)]
            await soon(lambda: len(begun) == 100)
            for number, client in enumerate(clients):
                client.leave(WAYS[number % len(WAYS)])
            most, before = 0, 0
            while len(ended) < 100:
                await asyncio.sleep(0)
                most, before = max(most, len(ended) - before), len(ended)
            assert most <= ENDING
            assert len(left) == 100 and max(left) <= 2 * ENDING
            for client in clients:
                client.close()

    uvloop.run(check())


@pytest.mark.parametrize("goes_on", (False, True), ids=("foreground", "background"))
def test_requests_stop_when_their_client_leaves(goes_on: bool) -> None:
    """Those that are opened while the handler ends as well; an answer to be fetched goes on."""
    stopped: list[str] = []
    frontend: Any = SimpleNamespace(stop=lambda ids: stopped.extend(ids))
    gateway = Gateway(lambda: frontend, Standing(True, ""), RouteTable())
    states: list[str] = []

    def ask(name: str) -> None:
        request: Any = SimpleNamespace(request_id=name)
        engine_requests.enter(request)

    async def handle(request: web.Request) -> web.StreamResponse:
        with gateway.answering(request, goes_on):
            ask("first")
            states.append("asked")
            try:
                await asyncio.sleep(60)
            finally:
                ask("late")
                states.append("ended")
        raise AssertionError

    async def check() -> None:
        async with serving(handle) as port:
            client = Client(port).send(post("/", {}))
            await soon(lambda: "asked" in states)
            client.leave("close")
            await soon(lambda: "ended" in states)
            assert stopped == ([] if goes_on else ["first", "late"])

    uvloop.run(check())


CHUNKED = head("POST", "/v1/completions", {"Transfer-Encoding": "chunked"})
BEHIND = {
    "upgrade": ({"Connection": "Upgrade", "Upgrade": "websocket"}, bytes(600_000)),
    "body": ({}, head("POST", "/", {"Content-Length": "3000000"}) + bytes(600_000)),
    "chunks": ({}, CHUNKED + b"18\r\n%024d\r\n" % 0 * 20_000),  # so many, and not too small
    "more": ({}, post("/", {}) * 100),
}


@pytest.mark.parametrize("over", ("tcp", "unix", "tls"))
@pytest.mark.parametrize("behind", BEHIND)
def test_those_that_leave_are_seen_whatever_they_have_sent(
    behind: str, over: str, tmp_path: Path
) -> None:
    """Behind their request, where nobody reads it; the rest of it is in the kernels' buffers."""
    headers, more = BEHIND[behind]
    path = "/v1/realtime" if behind == "upgrade" else "/"
    running = 0
    options = {"uds": str(tmp_path / "socket")} if over == "unix" else {}
    options |= self_signed(tmp_path) if over == "tls" else {}

    async def wait(request: web.Request) -> web.StreamResponse:
        nonlocal running
        await request.read()
        running += 1
        try:
            await asyncio.sleep(3600)
        finally:
            running -= 1
        raise AssertionError

    def ask(port: int) -> socket.socket:
        unix = over == "unix"
        client = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        client.settimeout(30)
        client.connect(options["uds"] if unix else ("127.0.0.1", port))
        if over == "tls":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            client = context.wrap_socket(client)
        client.sendall(post(path, {}, headers))
        return client

    def leave(client: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            client.settimeout(0.1)
            client.sendall(more)
        with contextlib.suppress(OSError):
            if way == "half":
                client.shutdown(socket.SHUT_WR)
                return
            if way == "reset":
                linger = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.close()

    async def check() -> None:
        async with serving(wait, **options) as port:
            clients = [await asyncio.to_thread(ask, port) for _ in WAYS]
            await soon(lambda: running == len(WAYS))
            for client, way in zip(clients, WAYS, strict=True):
                await asyncio.to_thread(leave, client, way)
            await soon(lambda: not running, within=5)
            for client in clients:
                client.close()

    uvloop.run(check())


def test_a_body_that_is_large_and_slow_is_no_reason_to_close() -> None:
    """What keeps the connection from being read is the request's own body, until its turn comes."""

    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(2 * UNREAD)
        size = 0
        async for piece in request.content.iter_chunked(100_000):
            size += len(piece)
            await asyncio.sleep(UNREAD / 4)
        return web.Response(text=f"<{size}>")

    async def check() -> None:
        async with serving(slow) as port:
            client = Client(port)
            await asyncio.to_thread(client.send, post("/", bytes(1_000_000)))
            assert b"<1000000>" in await asyncio.to_thread(client.read)
            client.close()

    uvloop.run(check())


def test_one_that_reads_nothing_is_cut_off() -> None:
    """Also where all of its answer is in the send buffer, and nobody waits to write more."""

    async def check() -> None:
        ended = 0

        async def large(request: web.Request) -> web.StreamResponse:
            nonlocal ended
            ended += 1
            return web.Response(body=bytes(16 << 20))

        async with serving(large, Limits(send_timeout=0.2)) as port:
            client = Client(port, SMALL).send(post("/", {}))
            await soon(lambda: ended)
            await asyncio.sleep(0.6)
            got = await asyncio.to_thread(client.rest)
            assert len(got) < 16 << 20
            client.close()

    uvloop.run(check())
