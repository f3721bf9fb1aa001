"""Crowds that begin their TLS handshakes in the same moment, and what a client does with one."""

import _ssl
import asyncio
import contextlib
import ctypes
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop
from aiohttp import web

from llumnix.metrics import CLOSED
from llumnix.server.transport import listener, tls_handshakes
from llumnix.server.transport.connection_places import Limits
from tests.kit.leaving import head
from tests.kit.loop import soon
from tests.kit.serving import self_signed, serving

GET = head("GET", "/livez", {})
CROWD = 60
RUNS: tuple[Callable[..., Any], ...] = (uvloop.run, asyncio.run)


@dataclass
class Crowd:
    """What the server has seen of ClientHellos."""

    turn: int = 0
    seen: Counter[int] = field(default_factory=Counter)  # by turn of the loop

    @property
    def most(self) -> int:
        """In one turn."""
        return max(self.seen.values())

    async def count_turns(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return self_signed(tmp_path_factory.mktemp("tls"))


async def ok(request: web.Request) -> web.StreamResponse:
    return web.Response(text="ok")


@contextlib.asynccontextmanager
async def crowd_at(
    certificate: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    curve: str | None = None,
    limits: Limits | None = None,
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = ok,
) -> AsyncIterator[tuple[int, Crowd]]:
    """The port of a TLS server, which may know one curve alone, and what comes to it."""
    seen = Crowd()
    make = listener._server_ssl

    def made(arguments: Any) -> ssl.SSLContext:
        context = make(arguments)
        assert context is not None
        if curve is not None:
            context.set_ecdh_curve(curve)

        def hello(*_: Any) -> None:
            seen.seen[seen.turn] += 1

        context.sni_callback = hello  # within the call that answers a ClientHello
        return context

    monkeypatch.setattr(listener, "_server_ssl", made)
    async with serving(handler, limits, **certificate) as port:
        ticking = asyncio.create_task(seen.count_turns())
        try:
            yield port, seen
        finally:
            ticking.cancel()


class TlsClient:
    """One that says something when it is told to, and not before."""

    def __init__(self, port: int, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = context.maximum_version = version
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out)
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)

    def step(self) -> bool:
        """Go on as far as it can; whether the handshake is over."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def say(self) -> bytes:
        """What it has to say."""
        return self._out.read()

    def send(self) -> None:
        self.socket.setblocking(True)
        self.socket.sendall(self.say())
        self.socket.setblocking(False)

    async def hear(self) -> None:
        """Something more; raises EOFError if there is nothing."""
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.socket, 65536), 20)
        if not data:
            raise EOFError
        self._in.write(data)

    async def shake(self) -> None:
        while not self.step():
            self.send()
            await self.hear()

    async def ask(self) -> bytes:
        """Ask in the same message that ends the handshake, as clients do."""
        self.tls.write(GET)
        self.send()
        while True:
            try:
                return self.tls.read()
            except ssl.SSLWantReadError:
                await self.hear()


@contextlib.contextmanager
def clients(port: int, number: int, version: ssl.TLSVersion) -> Iterator[list[TlsClient]]:
    found = [TlsClient(port, version) for _ in range(number)]
    try:
        yield found
    finally:
        for client in found:
            client.socket.close()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_crowd_is_greeted_a_few_at_a_time(
    certificate: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Awaitable[None]], None],
    version: ssl.TLSVersion,
) -> None:
    async def check() -> None:
        async with crowd_at(certificate, monkeypatch) as (port, crowd):
            with clients(port, CROWD, version) as all_of_them:
                await asyncio.sleep(0.1)  # until they are accepted; else that keeps them apart
                for client in all_of_them:
                    client.step()
                    client.send()
                for client in all_of_them:
                    await client.shake()
                    assert b"200 OK" in await client.ask()
            assert crowd.seen.total() == CROWD
            assert crowd.most <= tls_handshakes.AT_ONCE

    run(check())


def test_nor_does_a_second_hello_come_at_once(
    certificate: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is answered with the wish for another curve, and the second costs the signature."""

    async def check() -> None:
        async with crowd_at(certificate, monkeypatch, curve="secp384r1") as (port, crowd):
            with clients(port, CROWD, ssl.TLSVersion.TLSv1_3) as all_of_them:
                for client in all_of_them:
                    client.step()
                    client.send()
                for client in all_of_them:
                    await client.hear()
                    assert not client.step()
                crowd.seen.clear()
                for client in all_of_them:
                    client.send()
                for client in all_of_them:
                    await client.shake()
                    assert b"200 OK" in await client.ask()
            assert crowd.seen.total() == CROWD
            assert crowd.most <= tls_handshakes.AT_ONCE

    uvloop.run(check())


@pytest.mark.parametrize("run", RUNS)
def test_a_hello_in_pieces_waits_like_all_others(
    certificate: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Awaitable[None]], None],
) -> None:
    """Whether they are pieces of a record, or records."""

    async def check() -> None:
        async with crowd_at(certificate, monkeypatch) as (port, crowd):
            with clients(port, CROWD, ssl.TLSVersion.TLSv1_3) as all_of_them:
                ends = []
                for number, client in enumerate(all_of_them):
                    client.step()
                    hello = client.say()
                    if number % 2:
                        kind, body = hello[:3], hello[5:]
                        parts = [body[at : at + 16] for at in range(0, len(body), 16)]
                        hello = b"".join(kind + len(p).to_bytes(2) + p for p in parts)
                    client.socket.sendall(hello[:9])
                    ends.append(hello[9:])
                await asyncio.sleep(0.1)  # until the beginnings are read
                for client, end in zip(all_of_them, ends, strict=True):
                    client.socket.sendall(end)
                for client in all_of_them:
                    await client.shake()
                    assert b"200 OK" in await client.ask()
            assert crowd.seen.total() == CROWD
            assert crowd.most <= tls_handshakes.AT_ONCE

    run(check())


@pytest.mark.parametrize("run", RUNS)
def test_who_leaves_or_says_nothing_leaves_nothing(
    certificate: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Awaitable[None]], None],
) -> None:
    async def check() -> None:
        limits = Limits(header_timeout=1.0)
        async with crowd_at(certificate, monkeypatch, limits=limits) as (port, _):
            tasks = len(asyncio.all_tasks())
            with clients(port, 8, ssl.TLSVersion.TLSv1_3) as (gone, half, foreign, *silent):
                half.step()
                half.socket.sendall(half.say())
                half.socket.shutdown(socket.SHUT_WR)
                gone.step()
                gone.socket.sendall(gone.say()[:100])
                gone.socket.close()
                foreign.socket.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)
                for client in (half, foreign, *silent):
                    with pytest.raises((EOFError, ConnectionResetError)):
                        while True:
                            await client.hear()
                await soon(lambda: len(asyncio.all_tasks()) == tasks)
            # And all others are served.
            with clients(port, 1, ssl.TLSVersion.TLSv1_3) as (client,):
                await client.shake()
                assert b"200 OK" in await client.ask()

    run(check())


def test_the_oldest_handshake_is_given_up_for_a_new_one(
    certificate: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        monkeypatch.setattr("llumnix.server.transport.acceptor.GREETING", 20)
        before = CLOSED.labels("handshake")._value.get()
        async with crowd_at(certificate, monkeypatch) as (port, _):
            with clients(port, 30, ssl.TLSVersion.TLSv1_3) as all_of_them:
                for client in all_of_them[:10]:
                    with pytest.raises((EOFError, ConnectionResetError)):
                        await client.hear()
                last = all_of_them[-1]
                await last.shake()
                assert b"200 OK" in await last.ask()
        assert CLOSED.labels("handshake")._value.get() - before == 10

    uvloop.run(check())


def key_updates(client: TlsClient, number: int) -> bytes:
    """So many records, each of which changes the keys and asks for as much."""
    openssl = ctypes.CDLL(_ssl.__file__)
    openssl.SSL_key_update.argtypes = [ctypes.c_void_p, ctypes.c_int]
    openssl.SSL_do_handshake.argtypes = [ctypes.c_void_p]
    # Behind the head of a Python object and the socket, of which there is none.
    handle = ctypes.c_void_p.from_address(id(client.tls._sslobj) + 24).value  # type: ignore[attr-defined]
    for _ in range(number):
        assert openssl.SSL_key_update(handle, 1) == 1 and openssl.SSL_do_handshake(handle) == 1
    return client.say()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("first", [True, False], ids=["with the handshake", "later"])
def test_a_client_that_only_changes_its_keys_is_cut_off(
    certificate: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Awaitable[None]], None],
    first: bool,
) -> None:
    async def check() -> None:
        before = CLOSED.labels("records")._value.get()
        async with crowd_at(certificate, monkeypatch) as (port, _):
            with clients(port, 2, ssl.TLSVersion.TLSv1_3) as (client, other):
                await other.shake()
                for _ in range(3):  # as some libraries do after many bytes
                    other.socket.sendall(key_updates(other, 5))
                    assert b"200 OK" in await other.ask()
                await client.shake()
                if not first:
                    assert b"200 OK" in await client.ask()
                flood, spent = client.say() + key_updates(client, 5000), time.thread_time()
                sending = asyncio.get_running_loop().sock_sendall(client.socket, flood)
                with pytest.raises((EOFError, OSError)):
                    await sending
                    while True:
                        await client.hear()
                assert CLOSED.labels("records")._value.get() - before == 1
                assert time.thread_time() - spent < 0.1, "of some 150 ms with all that it has sent"

    run(check())


@pytest.mark.parametrize("run", RUNS)
def test_large_bodies_come_whole_however_slowly_they_are_read(
    certificate: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Awaitable[None]], None],
) -> None:
    async def read(request: web.Request) -> web.StreamResponse:
        size = 0
        async for piece in request.content.iter_chunked(16 * 1024):
            size += len(piece)
            await asyncio.sleep(0)
        return web.Response(text=str(size))

    async def check() -> None:
        async with crowd_at(certificate, monkeypatch, handler=read) as (port, _):
            with clients(port, 4, ssl.TLSVersion.TLSv1_3) as all_of_them:
                body = bytes(3 << 20)
                for client in all_of_them:
                    await client.shake()
                    client.tls.write(head("POST", "/", {"Content-Length": str(len(body))}))
                    client.tls.write(body)
                loop = asyncio.get_running_loop()
                sent = [loop.sock_sendall(client.socket, client.say()) for client in all_of_them]
                await asyncio.gather(*sent)
                for client in all_of_them:
                    answer = b""
                    while str(len(body)).encode() not in answer:
                        try:
                            answer += client.tls.read()
                        except ssl.SSLWantReadError:
                            await client.hear()

    run(check())
