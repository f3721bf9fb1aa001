"""What those without a key may keep of a server: a place, for a while, unless somebody needs it."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from aiohttp import ClientSession, web

from llumnix.dataplane.peer import PATH
from llumnix.server.transport.connection import Connection
from llumnix.server.transport.connection_places import NEWEST, PROMPT, Limits, Places
from tests.kit.leaving import SMALL, Client, head, post
from tests.kit.loop import descriptors, soon
from tests.kit.serving import closed, opened, self_signed, serving

LARGE = 8 << 20  # bytes, for which no kernel has room
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PROBE = head("GET", "/livez", {})


async def answer(client: Client) -> bytes:
    return await asyncio.to_thread(client.read)


async def whole(request: web.Request) -> web.StreamResponse:
    return web.Response(body=bytes(LARGE if request.path == "/large" else 10))


async def streamed(request: web.Request) -> web.StreamResponse:
    if request.path != "/large":
        return await whole(request)
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(LARGE >> 16):
        await response.write(bytes(1 << 16))
    return response


def known(request: web.Request) -> None:
    assert isinstance(request.protocol, Connection)
    request.protocol.vouch()


def stuck(port: int, number: int) -> list[Client]:
    return [Client(port, SMALL).send(head("GET", "/large", {})) for _ in range(number)]


@pytest.mark.parametrize("handler", (whole, streamed))
def test_who_does_not_take_his_answer_gives_way(handler: Handler) -> None:
    """Before all others, also while it is being written."""

    async def check() -> None:
        async with serving(handler, Limits(connections=10, reserve=2, header_timeout=60)) as port:
            clients = stuck(port, 10)
            await soon(lambda: opened() == 10)
            await asyncio.gather(*(asyncio.to_thread(client.read, 1) for client in clients))
            before = closed("displaced")
            ordinary = [Client(port) for _ in range(5)]
            for client in ordinary:
                assert b"200 OK" in await answer(client.send(post("/", {})))
            probe = Client(port).send(PROBE)
            assert b"200 OK" in await answer(probe)
            assert closed("displaced") - before == 6 and opened() == 10
            for client in (*clients, *ordinary, probe):
                client.close()
            await soon(lambda: not opened())

    uvloop.run(check())


@pytest.mark.parametrize("handler", (whole, streamed))
def test_a_stranger_has_little_time_for_his_answer(handler: Handler) -> None:
    """And whoever has shown a key has --send-timeout."""

    async def vouched(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            known(request)
        return await handler(request)

    async def check() -> None:
        async with serving(vouched, Limits(header_timeout=0.4)) as port:
            client = Client(port, SMALL).send(post("/large", {}))
            before = closed("stuck")
            strangers = stuck(port, 4)
            await soon(lambda: closed("stuck") - before == 4)
            await soon(lambda: opened() == 1)
            assert len(await asyncio.to_thread(client.some, LARGE)) >= LARGE
            for each in (client, *strangers):
                each.close()

    uvloop.run(check())


def test_a_node_that_is_linked_is_no_stranger() -> None:
    """Its WebSocket may stay behind for longer than an answer to who has shown nothing."""

    async def link(request: web.Request) -> web.StreamResponse:
        link = web.WebSocketResponse(heartbeat=30, compress=False)
        await link.prepare(request)
        await link.receive()
        for _ in range(LARGE >> 16):
            await link.send_bytes(bytes(1 << 16))
        await link.close()
        return link

    async def check() -> None:
        async with serving(link, Limits(header_timeout=0.2)) as port, ClientSession() as session:
            before = closed("stuck")
            url = f"http://127.0.0.1:{port}{PATH}"
            async with session.ws_connect(url, max_msg_size=0) as peer:
                await peer.send_str("go")
                assert peer._conn is not None
                peer._conn.transport.pause_reading()
                await asyncio.sleep(0.8)  # in which a stranger would be cut off
                peer._conn.transport.resume_reading()
                size = sum([len(message.data) async for message in peer])
            assert size == LARGE and closed("stuck") == before

    uvloop.run(check())


def test_the_newest_has_time_to_ask() -> None:
    """While all others have requests, one that comes does not end the one that came before it."""

    async def check() -> None:
        until = asyncio.Event()
        busy = 0

        async def wait(request: web.Request) -> web.StreamResponse:
            nonlocal busy
            if request.path == "/wait":
                busy += 1
                await until.wait()
            return web.Response(text="ok")

        async with serving(wait, Limits(connections=4, reserve=4)) as port:
            waiting = [Client(port).send(post("/wait", {})) for _ in range(3)]
            await soon(lambda: busy == 3)
            newest = [Client(port) for _ in range(5)]
            await soon(lambda: opened() == 8)
            assert b"200 OK" in await answer(newest[0].send(PROBE))
            # An ordinary request has the place of one that has none, not one that is reserved.
            assert b"200 OK" in await answer(newest[1].send(post("/", {})))
            assert b"200 OK" in await answer(newest[2].send(PROBE))
            until.set()
            for client in (*waiting, *newest):
                client.close()

    uvloop.run(check())


@pytest.mark.parametrize("tls", (False, True))
def test_who_finds_no_place_is_cut_off(tls: bool, tmp_path: Path) -> None:
    """Where all places have requests, those that are kept as well."""
    options = self_signed(tmp_path) if tls else {}

    def connect(port: int) -> socket.socket:
        return silent(port) if tls else socket.create_connection(("127.0.0.1", port), 30)

    def rest(client: socket.socket) -> bytes:
        try:
            return client.recv(100)
        except OSError:
            return b""

    async def check() -> None:
        until, busy = asyncio.Event(), 0

        async def wait(request: web.Request) -> web.StreamResponse:
            nonlocal busy
            busy += 1
            await until.wait()
            return web.Response(text="ok")

        async with serving(wait, Limits(connections=2, reserve=1), **options) as port:
            clients = []
            for asked in (post("/", {}), post("/", {}), PROBE):
                clients.append(await asyncio.to_thread(connect, port))
                await asyncio.to_thread(clients[-1].sendall, asked)
                await soon(lambda: busy == len(clients))
            before, refused = sockets(), closed("refused")
            last = await asyncio.to_thread(connect, port)
            assert await asyncio.to_thread(rest, last) == b""
            await soon(lambda: sockets() == before + 1)  # the client's own
            assert closed("refused") - refused == 1 and opened() == 3
            until.set()
            assert b"200 OK" in await asyncio.to_thread(rest, clients[0])
            for client in (*clients, last):
                client.close()

    uvloop.run(check())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return self_signed(tmp_path_factory.mktemp("tls"))


def silent(port: int) -> ssl.SSLSocket:
    """A client that shakes hands, and then neither says nor reads anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), 30))


def sockets() -> int:
    return sum("socket:" in what for _, what in descriptors())


def test_descriptors_of_closed_connections_count(certificate: dict[str, str]) -> None:
    """TLS waits for the client to close as well, who need not do so."""

    async def check() -> None:
        limits = Limits(connections=6, reserve=2, header_timeout=60)
        async with serving(whole, limits, **certificate) as port:
            before = sockets()
            clients = []
            for _ in range(40):
                clients.append(await asyncio.to_thread(silent, port))
            await soon(lambda: sockets() - before - len(clients) <= 6 + 2 + 1)
            for client in clients:
                client.close()

    uvloop.run(check())


def test_tls_does_not_wait_for_those_whose_time_is_over(certificate: dict[str, str]) -> None:
    async def check() -> None:
        async with serving(whole, Limits(header_timeout=0.5), **certificate) as port:
            before = sockets()
            clients = [await asyncio.to_thread(silent, port) for _ in range(5)]
            await soon(lambda: not opened())
            await soon(lambda: sockets() - before == len(clients), within=5)
            for client in clients:
                client.close()

    uvloop.run(check())


class Held:
    """A connection that nothing is to be sent to."""

    unsent = 0

    def __init__(self, ended: list["Held"], known: bool = False) -> None:
        self._ended = ended
        self.known = known

    def end(self) -> None:
        self._ended.append(self)

    def hang_up(self) -> None:
        """It has been ended before."""

    expect = hang_up


def test_strangers_that_have_had_an_answer_go_before_who_had_no_time_to_ask() -> None:
    """However many come at once: their requests may lie in their sockets already."""
    now, ended = 1000.0, list[Held]()
    many = 3 * NEWEST
    places = Places(Limits(connections=3 * many), lambda: now)
    clients, strangers = ([Held(ended, known) for _ in range(many)] for known in (True, False))
    for one in (*clients, *strangers):
        places.enter(one)
        places.begin(one)
        places.rest(one)
    now += 0.5
    fresh = [Held(ended) for _ in range(2 * many)]
    for one in fresh:
        places.enter(one)
    assert ended == strangers
    now += PROMPT + 0.1
    later = [Held(ended) for _ in range(many)]
    for one in later:
        places.enter(one)
    assert ended[many:] == fresh[:many], "and clients last"
    for one in (*clients, *fresh, *later):
        places.leave(one)


def test_a_few_that_have_been_silent_go_before_a_client() -> None:
    now, ended = 1000.0, list[Held]()
    places = Places(Limits(connections=NEWEST), lambda: now)
    client = Held(ended, known=True)
    places.enter(client)
    places.begin(client)
    places.rest(client)
    silent = [Held(ended) for _ in range(NEWEST - 1)]
    for one in silent:
        places.enter(one)
    now += PROMPT + 0.1
    later = Held(ended)
    places.enter(later)
    assert ended == silent[:1]
    for one in (client, later, *silent):
        places.leave(one)
