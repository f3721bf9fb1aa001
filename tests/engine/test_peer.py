"""The peer channel: who is let in, and what a peer that stalls costs the others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from llumnix.engine import peer
from llumnix.engine.base import EngineDead
from llumnix.engine.frames import Cancel, Codec, Hello, Reply
from llumnix.engine.peer import PATH
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import Mesh, mesh
from tests.kit.requests import answer

PROMPT = [21, 22, 23]


@pytest.mark.parametrize(
    "header",
    [None, "", "secret", "Bearer wrong", "Bearer secrets", "Bearer sécret", "bearer secret"],
)
@on_loop
async def test_who_does_not_know_the_token_is_refused(header: str | None) -> None:
    async with mesh("b") as (b,):
        headers = {} if header is None else {"Authorization": header}
        async with aiohttp.ClientSession() as session:
            url = f"http://{b._mesh.addresses['b']}{PATH}"
            async with session.get(url, headers=headers) as reply:
                assert reply.status == 401
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                await session.ws_connect(url, headers=headers)
            assert refusal.value.status == 401
        assert b.peers.open == 0


@on_loop
async def test_a_token_that_is_no_text_is_refused() -> None:
    async with mesh("b") as (b,):
        host, port = b._mesh.addresses["b"].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET " + PATH.encode() + b" HTTP/1.1\r\nHost: b\r\n")
        writer.write(b"Authorization: Bearer \xff\xfe\r\n\r\n")
        assert b" 401 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


@on_loop
async def test_a_node_with_another_token_gets_an_error() -> None:
    ours, theirs = Mesh(), Mesh("another secret")
    a, b = await ours.node("a"), await theirs.node("b")
    ours.addresses |= theirs.addresses
    with pytest.raises(EngineDead, match=r"node b does not answer: .*401"):
        await a.peers.link("b")
    await a.close()
    await b.close()


@asynccontextmanager
async def dialled(b: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A connection to b by hand, with the right token."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(
            f"http://{b._mesh.addresses['b']}{PATH}", headers={"Authorization": "Bearer secret"}
        ) as socket,
    ):
        yield socket


@pytest.mark.parametrize(
    "greeting",
    [b"junk", Codec().encode(Cancel("b-0", ["r"])), "text", None],
    ids=["junk", "another frame", "text", "goodbye"],
)
@on_loop
async def test_a_greeting_that_is_none(greeting: bytes | str | None) -> None:
    async with mesh("b") as (b,):
        await b.host()
        async with dialled(b) as socket:
            match greeting:
                case bytes():
                    await socket.send_bytes(greeting)
                case str():
                    await socket.send_str(greeting)
            if greeting is not None:
                assert (await socket.receive()).type is not aiohttp.WSMsgType.BINARY
        assert b.peers.open == 0
        assert await b.answered("r1", PROMPT) == answer(PROMPT, 8)


@pytest.mark.parametrize("junk", [b"", b"junk", b"\xff" * 64, Codec().encode(Reply(1))[:-1]])
@on_loop
async def test_junk_ends_only_its_own_link(junk: bytes) -> None:
    async with mesh("a", "b") as (a, b):
        await b.host()
        assert await a.answered("r1", PROMPT) == answer(PROMPT, 8)
        async with dialled(b) as socket:
            await socket.send_bytes(Codec().encode(Hello("c", "test")))
            assert Codec().decode(await socket.receive_bytes()) == Hello("b", "test")
            assert b.peers.open == 2
            await socket.send_bytes(junk)
            assert (await socket.receive()).type is not aiohttp.WSMsgType.BINARY
        await soon(lambda: b.peers.open == 1)
        assert await a.answered("r2", PROMPT) == answer(PROMPT, 8)


@on_loop
async def test_a_reply_that_nobody_waits_for_is_ignored() -> None:
    async with mesh("b") as (b,):
        await b.host()
        async with dialled(b) as socket:
            await socket.send_bytes(Codec().encode(Hello("c", "test")))
            await socket.receive_bytes()
            await socket.send_bytes(Codec().encode(Reply(17, "what?")))
            await socket.send_bytes(Codec().encode(Hello("c", "again")))
            assert await b.answered("r1", PROMPT) == answer(PROMPT, 8)
            assert b.peers.open == 1


# ---- a peer that does not behave ----


@asynccontextmanager
async def strange_node(mesh_: Mesh, name: str, handler: Any) -> AsyncIterator[None]:
    """Something at a node's address that is no node."""
    app = web.Application()
    app.router.add_get(PATH, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.2, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    mesh_.addresses[name] = f"127.0.0.1:{runner.addresses[0][1]}"
    mesh_.instances[f"{name}-0"] = name
    try:
        yield
    finally:
        await runner.cleanup()


async def _hangs_up(request: web.Request) -> web.StreamResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.close()
    return socket


async def _talks_text(request: web.Request) -> web.StreamResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.send_str("hello")
    await socket.close()
    return socket


async def _is_another_server(request: web.Request) -> web.StreamResponse:
    return web.Response(text="welcome")


@pytest.mark.parametrize("handler", [_hangs_up, _talks_text, _is_another_server])
@on_loop
async def test_something_else_at_the_address_of_a_node(handler: Any) -> None:
    async with mesh("a") as (a,), strange_node(a._mesh, "b", handler):
        a.target = "b-0"
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: stream.ended)
        assert stream.failure is not None and "node b" in stream.failure


@on_loop
async def test_nobody_at_the_address_of_a_node() -> None:
    async with mesh("a") as (a,):
        a._mesh.addresses["b"] = "127.0.0.1:1"
        a._mesh.instances["b-0"] = a.target = "b-0"
        a._mesh.instances["b-0"] = "b"
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: stream.ended)
        assert stream.failure is not None
        assert "no instance was ready within 2 s" in stream.failure
        assert "node b does not answer: " in stream.failure


class Stalled:
    """A node that says hello and then reads nothing any more, as a frozen process does."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoping=False)
        await socket.prepare(request)
        await socket.receive_bytes()
        await socket.send_bytes(Codec().encode(Hello("b", "test")))
        assert request.transport is not None
        request.transport.pause_reading()  # type: ignore[attr-defined]
        await self.ended.wait()
        return socket


@on_loop
async def test_a_stalled_node_costs_the_others_nothing() -> None:
    stalled = Stalled()
    async with mesh("a", "c") as (a, c), strange_node(a._mesh, "b", stalled.handle):
        instance = await c.host()
        link = await a.peers.link("b")
        for _ in range(200):
            link.send(Reply(1, "x" * 100_000))
        assert await a.answered("r1", PROMPT) == answer(PROMPT, 8)
        a.target = "b-0"
        stuck = await a.ask("stuck", PROMPT)
        await soon(lambda: (e := a.client.ledger.get("stuck")) is not None and e.epoch == 1)
        a.target = instance
        # Its heartbeats stay unanswered; then the request goes elsewhere.
        await soon(lambda: stuck.ended, within=3 * peer.HEARTBEAT)
        assert stuck.tokens == answer(PROMPT, 8)
        assert link.closed and a.peers.open == 1
        stalled.ended.set()


@on_loop
async def test_a_node_that_is_too_far_behind_is_cut_off() -> None:
    stalled = Stalled()
    limit, peer.QUEUE_FRAMES = peer.QUEUE_FRAMES, 50
    try:
        async with mesh("a") as (a,), strange_node(a._mesh, "b", stalled.handle):
            link = await a.peers.link("b")
            sent = 0
            while not link.closed:
                link.send(Reply(1, "x" * 1_000_000))
                sent += 1
                await asyncio.sleep(0)
                assert sent < 1000, "frames pile up without end"
            with pytest.raises(EngineDead, match="closed"):
                link.send(Reply(1))
            await soon(lambda: a.peers.open == 0, within=3 * peer.HEARTBEAT)
            stalled.ended.set()
    finally:
        peer.QUEUE_FRAMES = limit


@on_loop
async def test_both_dial_at_once_and_one_leaves() -> None:
    """Two links may come of it; closing ends both."""
    whole = Mesh()
    a, b = await whole.node("a"), await whole.node("b")
    await a.host()
    await b.host()
    a.target, b.target = "b-0", "a-0"
    streams = await asyncio.gather(a.ask("r1", PROMPT), b.ask("r2", PROMPT))
    await soon(lambda: all(stream.ended for stream in streams))
    assert [stream.tokens for stream in streams] == [answer(PROMPT, 8)] * 2
    async with asyncio.timeout(5):
        await a.close()
        await b.close()


@on_loop
async def test_a_link_is_dialled_once_for_all_who_wait() -> None:
    async with mesh("a", "b") as (a, b):
        links = await asyncio.gather(*(a.peers.link("b") for _ in range(10)))
        assert len(set(map(id, links))) == 1
        await soon(lambda: b.peers.open == 1)


class GoneSocket:
    """A socket whose other end goes while a ping of it is answered, as aiohttp tells that."""

    closed = False

    def __aiter__(self) -> "GoneSocket":
        return self

    async def __anext__(self) -> Any:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    async def close(self) -> None:
        self.closed = True


@on_loop
async def test_a_connection_that_breaks_while_a_ping_is_answered_just_ends() -> None:
    socket = GoneSocket()
    link = peer.Link(socket, "b")  # type: ignore[arg-type]
    await link.run(lambda *_: asyncio.sleep(0))
    assert link.closed and socket.closed
