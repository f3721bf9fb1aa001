"""Clients that leave, at a server without a node: the application hears of it, and lets go."""

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvloop
from aiohttp import web
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from llumnix.entrypoints.server import asgi
from llumnix.entrypoints.server.places import Limits
from tests.kit.leaving import SMALL, WAYS, Client, post
from tests.kit.loop import soon
from tests.kit.serving import serving


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
