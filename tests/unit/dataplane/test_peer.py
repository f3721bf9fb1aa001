"""The peer channel: who is let in, and what a peer that stalls costs the others."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from llumnix.dataplane import peer
from llumnix.dataplane import peer_link as links
from llumnix.dataplane.frames import Codec, Hello, Reply
from llumnix.dataplane.peer import PATH
from llumnix.dataplane.peer_link import HEARTBEAT
from llumnix.dataplane.peer_proof import CHALLENGE, PROOF
from llumnix.engine.base import EngineDead
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import TOKEN, Mesh, mesh
from tests.kit.requests import answer
from tests.kit.strangers import Accepter, dialled, introduction, proven

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
            url = f"http://{b.address}{PATH}"
            async with session.get(url, headers=headers) as reply:
                assert reply.status == 401
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                await session.ws_connect(url, headers=headers)
            assert refusal.value.status == 401
        assert b.peers.open == 0


@on_loop
async def test_a_node_of_an_older_version_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """It shows the token itself, which nobody takes any more; the log says so."""
    async with mesh("b") as (b,), aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            await session.ws_connect(f"http://{b.address}{PATH}", headers=headers)
        assert refusal.value.status == 401 and "as older versions of llumnix do" in caplog.text


@pytest.mark.parametrize("header", [b"Authorization: Bearer \xff\xfe", b"X-Llumnix-Node: \xff"])
@on_loop
async def test_headers_that_are_no_text_are_refused(header: bytes) -> None:
    async with mesh("b") as (b,):
        host, port = b.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET " + PATH.encode() + b" HTTP/1.1\r\nHost: b\r\n" + header + b"\r\n\r\n")
        assert b" 401 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


@on_loop
async def test_a_node_with_another_token_gets_an_error(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = Mesh(), Mesh("another secret")
    a, b = await ours.node("a"), await theirs.node("b")
    ours.addresses |= theirs.addresses
    with pytest.raises(EngineDead, match=r"node b does not answer: wrong token: .*401"):
        await a.peers.link("b")
    assert "node b gets nothing: wrong token" in caplog.text
    await a.close()
    await b.close()


# ---- who may link ----


@on_loop
async def test_a_forged_entry_in_etcd_gets_neither_token_nor_prompt() -> None:
    """What stands at the address hears a name and a nonce, and no more, whatever it answers."""
    heard: list[str] = []

    async def listen(request: web.Request) -> web.StreamResponse:
        heard.append(f"{request.method} {request.path} {dict(request.headers)}")
        made_up = {CHALLENGE: "1-2-3", "X-Llumnix-Life-There": "1", PROOF: "0" * 64}
        return web.Response(status=401, headers=made_up)

    async with mesh("a") as (a,), strange_node(a._mesh, "evil", listen):
        a.target = "evil-0"
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: stream.ended)
        assert stream.failure is not None and "node evil does not answer" in stream.failure
        assert heard and not any(TOKEN in each or PROOF in each for each in heard)


@on_loop
async def test_a_real_node_proves_nothing_for_an_address_that_is_not_its_own() -> None:
    """Who puts itself between two nodes by a forged address gets no proof to pass on."""
    async with mesh("a", "b") as (a, b), aiohttp.ClientSession() as session:
        passed: list[int] = []

        async def relay(request: web.Request) -> web.StreamResponse:
            url = f"http://{b.address}{PATH}"
            headers = {k: v for k, v in request.headers.items() if k.startswith("X-")}
            for more in ({}, {"X-Llumnix-Address": b.address}, {"X-Llumnix-To": "c"}):
                async with session.get(url, headers=headers | more) as reply:
                    passed.append(reply.status)
                    if CHALLENGE in reply.headers:
                        break
            return web.Response(status=reply.status, headers=dict(reply.headers))

        async with strange_node(a._mesh, "b", relay):
            with pytest.raises(EngineDead, match="wrong token"):
                await a.peers.link("b")
        assert passed == [401, 401] and b.peers.open == 0


@on_loop
async def test_an_answer_is_good_once() -> None:
    async with mesh("b") as (b,), aiohttp.ClientSession() as session:
        url = f"http://{b.address}{PATH}"
        headers = await proven(session, b, introduction(b))
        async with session.ws_connect(url, headers=headers) as socket:
            await socket.receive_bytes()
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                await session.ws_connect(url, headers=headers)
            assert refusal.value.status == 401 and b.peers.open == 1


@on_loop
async def test_the_token_does_not_give_the_place_of_a_node_that_is_connected() -> None:
    async with mesh("a", "b") as (a, b):
        await b.host()
        assert await a.answered("r1", PROMPT) == answer(PROMPT, 8)
        link = await a.peers.link("b")
        with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
            async with dialled(a, "b", "another life"):
                pass
        assert refusal.value.status == 401
        with pytest.raises(aiohttp.WSServerHandshakeError):
            async with dialled(a, "a", "another life"):
                pass
        assert await a.peers.link("b") is link and not link.closed
        async with dialled(a, "c", "one life") as socket:  # a name that nobody has
            await socket.receive_bytes()
            await soon(lambda: a.peers.open == 2)


@pytest.mark.parametrize("late", [True, False], ids=["another process", "the same"])
@on_loop
async def test_the_first_frame_must_prove_that_the_accepter_is_still_the_same(late: bool) -> None:
    real = Accepter()

    async def accept(request: web.Request) -> web.StreamResponse:
        if late and PROOF in request.headers:
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.send_bytes(Codec().encode(Hello("b", "test", request.headers[PROOF])))
            return socket
        return await real.accept(request)

    async with mesh("a") as (a,), strange_node(a._mesh, "b", accept):
        if late:
            with pytest.raises(EngineDead, match="wrong token"):
                await a.peers.link("b")
            assert a.peers.open == 0
        else:
            assert (await a.peers.link("b")).life == "life-b"


@pytest.mark.parametrize("stage", ["head", "pongs"])
@on_loop
async def test_a_greeting_has_a_deadline_that_nothing_restarts(stage: str) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        if PROOF not in request.headers and stage == "pongs":
            return await real.accept(request)
        if stage == "pongs":
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            while True:
                await socket.pong()
                await asyncio.sleep(0.02)
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 401 Unauthorized\r\n")
        while True:
            request.transport.write(b"X-Some: 1\r\n")
            await asyncio.sleep(0.02)

    real = Accepter()
    async with mesh("a") as (a,), strange_node(a._mesh, "b", slow):
        began = time.monotonic()
        with pytest.raises(EngineDead, match="node b does not answer: TimeoutError"):
            await a.peers.link("b", timeout=0.3)
        assert time.monotonic() - began < 1.5 and a.peers.open == 0


@pytest.mark.parametrize(
    ("host", "readable"),
    [("10.1.2.3", True), ("node-7", True), ("::1", False), ("127.0.0.9", False)],
)
@on_loop
async def test_a_link_that_can_be_read_on_its_way_is_told(
    host: str, readable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with mesh("b") as (b,):
        for _ in range(2):
            b.peers._keep(peer.Link(GoneSocket(), "c"), host)  # type: ignore[arg-type]
        b.peers._links.clear()
        b.peers._running.clear()
        assert caplog.text.count("is not encrypted") == readable


# ---- what comes over a link ----


@pytest.mark.parametrize("junk", [b"", b"junk", b"\xff" * 64, Codec().encode(Reply(1))[:-1]])
@on_loop
async def test_junk_ends_only_its_own_link(junk: bytes) -> None:
    async with mesh("a", "b") as (a, b):
        await b.host()
        assert await a.answered("r1", PROMPT) == answer(PROMPT, 8)
        async with dialled(b) as socket:
            hello = Codec().decode(await socket.receive_bytes())
            assert isinstance(hello, Hello) and (hello.node, hello.version) == ("b", "test")
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
        self._accepter = Accepter()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        socket = await self._accepter.accept(request, autoping=False)
        if not isinstance(socket, web.WebSocketResponse):
            return socket
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
        await soon(lambda: stuck.ended, within=3 * HEARTBEAT)
        assert stuck.tokens == answer(PROMPT, 8)
        assert link.closed and a.peers.open == 1
        stalled.ended.set()


@on_loop
async def test_a_node_that_is_too_far_behind_is_cut_off() -> None:
    stalled = Stalled()
    limit, links.QUEUE_FRAMES = links.QUEUE_FRAMES, 50
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
            await soon(lambda: a.peers.open == 0, within=3 * HEARTBEAT)
            stalled.ended.set()
    finally:
        links.QUEUE_FRAMES = limit


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
