"""How many connections there may be, and how long each may take for what."""

import asyncio
import contextlib
import dataclasses
import gzip
import json
import logging
import math
import resource
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from aiohttp import web

from llumnix.config import Config, ConfigError
from llumnix.server.transport.bodies import FREE, Bodies
from llumnix.server.transport.connection import Connection
from llumnix.server.transport.connection_places import Limits
from llumnix.server.transport.limits import connection_limits, places
from tests.kit.leaving import SMALL, Client, head, post
from tests.kit.loop import soon
from tests.kit.serving import closed, opened, serving

GET = head("GET", "/livez", {})
Check = Callable[[Callable[..., Awaitable[Any]]], Awaitable[None]]


async def read(client: Client, all_of_it: bool = False) -> bytes:
    """What comes next, or everything up to the end of the connection."""
    return await asyncio.to_thread(client.rest if all_of_it else client.read)


async def read_all(client: Client, patience: float) -> bytes:
    """What comes until the connection ends, or nothing comes for a while."""

    def take() -> bytes:
        client.socket.settimeout(patience)
        got = b""
        with contextlib.suppress(TimeoutError):
            while more := client.read():
                got += more
        return got

    return await asyncio.to_thread(take)


async def ok(request: web.Request) -> web.StreamResponse:
    return web.Response(text="ok")


def error(answer: bytes) -> tuple[int, str]:
    """The status and the message of an error, which has the shape of the OpenAI API."""
    top, _, body = answer.rpartition(b"\r\n\r\n")
    found = json.loads(body)["error"]
    status = int(top.split()[1])
    assert found["code"] == status and found["type"].endswith("Error") and "param" in found
    return status, found["message"]


# ---- how many ----


def test_idle_connections_give_way() -> None:
    """To probes and to all others: those that have been without a request for longest."""

    async def check() -> None:
        async def known(request: web.Request) -> web.StreamResponse:
            assert isinstance(request.protocol, Connection)
            request.protocol.vouch()
            return await ok(request)

        async with serving(known, Limits(connections=20)) as port:
            before = closed("displaced")
            used = Client(port).send(GET)
            assert b"200 OK" in await read(used)
            idle = [Client(port) for _ in range(30)]
            last = Client(port).send(GET)
            assert b"200 OK" in await read(last)
            assert await read(idle[0]) == b"", "the oldest has been closed"
            assert closed("displaced") - before == 12  # of 32 in 20 places
            assert opened() == 20
            assert b"200 OK" in await read(used.send(GET)), "those that never asked go first"
            for client in (used, last, *idle):
                client.close()
            await soon(lambda: opened() == 0)

    uvloop.run(check())


def test_probes_have_places_while_all_are_busy(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        until = asyncio.Event()
        seen: list[str] = []

        async def wait(request: web.Request) -> web.StreamResponse:
            seen.append(request.path)
            if request.path != "/livez":
                await until.wait()
            return web.Response(text="ok")

        async with serving(wait, Limits(connections=5, reserve=3)) as port:
            busy = [Client(port).send(post("/v1/completions", {})) for _ in range(5)]
            await soon(lambda: len(seen) == 5)
            for _ in range(5):
                refused = await read(client := Client(port).send(post("/", {})), all_of_it=True)
                status, message = error(refused)
                assert status == 503 and "5 connections have requests" in message
                client.close()
            silent = [Client(port) for _ in range(10)]
            probe = Client(port).send(GET)
            answer = await read(probe, all_of_it=True)  # so that the place is free again
            assert b"200 OK" in answer
            until.set()
            for client in busy:
                assert b"200 OK" in await read(client)
            for client in (*busy, *silent, probe):
                client.close()
            await soon(lambda: opened() == 0)

    uvloop.run(check())
    assert len([r for r in caplog.records if "have requests" in r.getMessage()]) == 1


def test_too_many_requests_behind_one_another() -> None:
    """A connection that is read no more would keep running what nobody waits for."""

    async def check() -> None:
        running = 0

        async def wait(request: web.Request) -> web.StreamResponse:
            nonlocal running
            running += 1
            try:
                await asyncio.sleep(0.3 if running == 1 else 3600)
            finally:
                running -= 1
            return web.Response(text="ok")

        async with serving(wait) as port:
            some = Client(port).send(GET * 20)
            await soon(lambda: running)
            many = Client(port).send(GET * 100)
            await read(many, all_of_it=True)
            assert b"200 OK" in await read(some)
            await soon(lambda: running == 1)
            some.leave("reset")
            await soon(lambda: not running)
            many.close()

    uvloop.run(check())


# ---- how long ----


def test_a_head_has_a_deadline(caplog: pytest.LogCaptureFixture) -> None:
    """Also one that comes byte by byte, and one behind an earlier request."""

    async def check() -> None:
        async with serving(ok, Limits(header_timeout=0.3, idle_timeout=30)) as port:
            silent, slow, later = (Client(port) for _ in range(3))
            assert b"200 OK" in await read(later.send(GET))
            slow.send(b"GET / HTTP/1.1\r\n")
            later.send(b"GET / HTTP/1.1\r\n")
            began = asyncio.get_running_loop().time()
            drips = 0
            reading = asyncio.create_task(read(slow, all_of_it=True))
            while not reading.done():
                assert asyncio.get_running_loop().time() - began < 5
                drips += 1
                try:
                    slow.send(b"A: b\r\n")
                except OSError:
                    break
                await asyncio.sleep(0.02)
            assert drips > 5
            for client in (silent, later):
                assert await read(client) == b""
            await soon(lambda: opened() == 0)
            for client in (silent, slow, later):
                client.close()

    uvloop.run(check())
    assert sum("no whole head" in r.getMessage() for r in caplog.records) == 1


def test_an_idle_connection_is_closed_and_a_slow_reader_is_not() -> None:
    async def check() -> None:
        size = 8 << 20

        async def large(request: web.Request) -> web.StreamResponse:
            return web.Response(body=bytes(size if request.path == "/large" else 1))

        async with serving(large, Limits(idle_timeout=0.3)) as port:
            reader = Client(port, SMALL).send(head("GET", "/large", {"Connection": "close"}))
            idle = Client(port).send(GET)
            assert b"200 OK" in await read(idle)
            assert await read(idle) == b""
            await asyncio.sleep(1.0)
            assert len(await read(reader, all_of_it=True)) > size
            for client in (reader, idle):
                client.close()

    uvloop.run(check())


# ---- bodies ----


def body_of(data: bytes, **headers: str) -> bytes:
    length = {"Content-Length": str(len(data))}
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return head("POST", "/", length | more) + data


def bodies_check(check: Check, timeout: float = 30.0, budget: int = 0) -> Bodies:
    """Run a check at a server that answers with the length of a body."""
    bodies = Bodies(timeout, budget)

    async def length(request: web.Request) -> web.StreamResponse:
        return web.Response(text=f"{len(await request.read())} bytes")

    async def run() -> None:
        async with serving(bodies.guard(length)) as port:

            async def ask(*pieces: bytes) -> bytes:
                client = Client(port)
                with contextlib.suppress(OSError):  # it may be refused before all is sent
                    for piece in pieces:
                        await asyncio.to_thread(client.send, piece)
                        await asyncio.sleep(0.02)
                try:
                    return await read(client)
                finally:
                    client.close()

            await check(ask)
        assert bodies.held == 0

    uvloop.run(run())
    return bodies


def test_whole_bodies_are_read_however_they_come() -> None:
    async def check(ask: Callable[..., Awaitable[bytes]]) -> None:
        data = bytes(300_000)
        assert b"300000 bytes" in await ask(body_of(data))
        assert b"5 bytes" in await ask(body_of(b"hello")[:-3], b"l", b"lo")
        chunked = head("POST", "/", {"Transfer-Encoding": "chunked"})
        assert b"8 bytes" in await ask(chunked, b"3\r\nabc\r\n", b"5\r\nhello\r\n0\r\n\r\n")
        assert b"0 bytes" in await ask(body_of(b""))
        assert b"0 bytes" in await ask(chunked, b"0\r\n\r\n")

    bodies_check(check, budget=400_000)


@pytest.mark.parametrize("encoding", ("gzip", "deflate", "br", "zstd", "x", "identity, gzip"))
def test_an_encoded_body_is_refused(encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whether it is what it says or not; a bomb is never undone."""

    async def check(ask: Callable[..., Awaitable[bytes]]) -> None:
        for data in (b'{"prompt": "x"}', gzip.compress(bytes(20 << 20)), bytes(900_000)):
            status, message = error(await ask(body_of(data, Content_Encoding=encoding)))
            assert status == 415 and encoding in message
        assert b"2 bytes" in await ask(body_of(b"{}", Content_Encoding="identity"))

    bodies_check(check)
    assert not [r for r in caplog.records if r.exc_info]


def test_a_body_has_a_deadline_and_a_size() -> None:
    async def check(ask: Callable[..., Awaitable[bytes]]) -> None:
        status, message = error(await ask(body_of(bytes(10_000))[:-1]))
        assert status == 408 and "0.3 s" in message
        status, message = error(await ask(head("POST", "/", {"Content-Length": "99999999"})))
        assert status == 413 and "1048576 bytes" in message
        chunked = head("POST", "/", {"Transfer-Encoding": "chunked"})
        answer = await ask(chunked, b"200000\r\n" + bytes(0x140000))
        assert error(answer)[0] == 413

    bodies_check(check, timeout=0.3)


def test_bodies_share_a_budget() -> None:
    async def check(ask: Callable[..., Awaitable[bytes]]) -> None:
        half = body_of(bytes(400_000))[:-1]
        waiting = [asyncio.create_task(ask(half)) for _ in range(2)]
        await asyncio.sleep(0.3)
        status, message = error(await ask(body_of(bytes(400_000))))
        assert status == 429 and "700000 bytes" in message
        assert b"60000 bytes" in await ask(body_of(bytes(60_000))), "small ones have their own"
        for answer in waiting:
            assert error(await answer)[0] == 408
        assert b"400000 bytes" in await ask(body_of(bytes(400_000))), "all is given back"

    assert FREE > 60_000
    bodies_check(check, timeout=1.0, budget=700_000)


def test_a_client_that_asks_first_hears_that_its_body_is_wanted() -> None:
    async def check(ask: Callable[..., Awaitable[bytes]]) -> None:
        asks = {"Expect": "100-continue", "Content-Length": "5"}
        answer = await ask(head("POST", "/", asks))
        assert answer == b"HTTP/1.1 100 Continue\r\n\r\n"
        refused = await ask(head("POST", "/", asks | {"Content-Encoding": "gzip"}))
        assert error(refused)[0] == 415 and b"100 Continue" not in refused
        old = await ask(head("POST", "/", asks, version="1.0"), b"hello")
        assert b"5 bytes" in old and b"100 Continue" not in old

    bodies_check(check)


def test_bodies_that_come_in_pieces_have_a_budget_of_their_own() -> None:
    """The first 64 KiB are free, but not of any number of bodies that never end."""

    async def check(ask: Callable[..., Awaitable[bytes]]) -> None:
        part = body_of(bytes(60_000))[:-1]
        waiting = [asyncio.create_task(ask(part)) for _ in range(4)]
        await asyncio.sleep(0.3)
        status, message = error(await ask(part))
        assert status == 503 and "try again soon" in message
        assert b"60000 bytes" in await ask(body_of(bytes(60_000))), "it comes with its head"
        for answer in waiting:
            assert error(await answer)[0] == 408
        assert b"60000 bytes" in await ask(part, b"x"), "all is given back"

    bodies_check(check, timeout=1.0, budget=500_000)


# ---- heads ----


def large(size: int) -> bytes:
    """A head of so many bytes that does not end, in headers of 8 KiB."""
    start, line = b"GET / HTTP/1.1\r\nHost: x\r\n", b"A: " + b"a" * 8187 + b"\r\n"
    return (start + line * (size // len(line) + 1))[:size]


@pytest.mark.parametrize("ends", [True, False])
def test_a_head_has_a_size(ends: bool) -> None:
    async def check() -> None:
        async with serving(ok) as port:
            for size in (1000, 60_000):
                client = Client(port).send(large(size) + b"\r\n\r\n")
                assert b"200 OK" in await read(client)
                assert b"200 OK" in await read(client.send(large(size) + b"\r\n\r\n"))
                client.close()
            for size in (66_000, 1_000_000):
                for before in (b"", GET):
                    client = Client(port).send(before)
                    assert not before or b"200 OK" in await read(client)
                    with contextlib.suppress(OSError):
                        client.send(large(size) + b"\r\n\r\n" * ends)
                    status, message = error(await read(client, all_of_it=True))
                    assert status == 431 and "65536 bytes" in message
                    client.close()
            await soon(lambda: opened() == 0)

    uvloop.run(check())


def test_heads_share_a_budget() -> None:
    """Those of some kilobytes do not count, so that ordinary clients get through."""

    async def check() -> None:
        async with serving(ok, Limits(heads_budget=500_000, header_timeout=1.0)) as port:
            some = [Client(port).send(large(60_000)) for _ in range(9)]
            await asyncio.sleep(0.2)
            late = Client(port).send(large(60_000))
            answer = await read(late, all_of_it=True)
            status, message = error(answer)
            assert status == 503 and "500000 bytes" in message and b"Retry-After: 1" in answer
            small = Client(port).send(large(8_000) + b"\r\n\r\n")
            assert b"200 OK" in await read(small)
            for client in some:
                assert await read(client) == b"", "its time is over"
            again = Client(port).send(large(60_000) + b"\r\n\r\n")
            assert b"200 OK" in await read(again)
            for client in (*some, late, small, again):
                client.close()

    uvloop.run(check())


def test_what_waits_behind_a_request_counts_as_well() -> None:
    async def check() -> None:
        until = asyncio.Event()

        async def wait(request: web.Request) -> web.StreamResponse:
            await until.wait()
            return web.Response(text="ok")

        async with serving(wait, Limits(heads_budget=500_000)) as port:
            behind = large(50_000) + b"\r\n\r\n" + body_of(bytes(50_000))
            clients = [Client(port).send(GET) for _ in range(6)]
            await asyncio.sleep(0.1)
            for client in clients:
                client.send(behind)
            await asyncio.sleep(0.3)
            until.set()
            answers = [await read(client, all_of_it=True) for client in clients[-1:]]
            assert answers[0].count(b"200 OK") >= 1 and b" 503 " in answers[0]
            for client in clients:
                client.close()

    uvloop.run(check())


def with_headers(number: int) -> bytes:
    return head("GET", "/", dict.fromkeys([f"{name:03x}" for name in range(number)], ""))


@pytest.mark.parametrize("at_once", (True, False))
def test_what_waits_counts_as_much_as_it_takes(at_once: bool) -> None:
    """A header of four bytes takes a hundred; and what waits still does so when one has begun."""

    async def check() -> None:
        until, running = asyncio.Event(), 0

        async def wait(request: web.Request) -> web.StreamResponse:
            nonlocal running
            running += 1
            await until.wait()
            return web.Response(text="ok")

        async with serving(wait, Limits(heads_budget=600_000)) as port:
            clients = []
            for number in (1, 2):
                clients.append(client := Client(port))
                if at_once:
                    client.send(GET + with_headers(200) * 15)
                else:
                    client.send(GET)
                    await soon(lambda number=number: running == number)
                    client.send(with_headers(200) * 15)
                await soon(lambda number=number: running == number)
                await asyncio.sleep(0.1)
            until.set()
            first, second = [await read_all(client, 0.5) for client in clients]
            assert first.count(b"200 OK") == 16 and b" 503 " not in first
            assert second.count(b"200 OK") < 16 and b" 503 " in second
            for client in clients:
                client.close()

    uvloop.run(check())


@pytest.mark.parametrize("path", ("/v1/completions", "/", "/llumnix/drain"))
def test_upgrades_are_refused_where_there_are_none(path: str) -> None:
    async def check() -> None:
        async with serving(ok) as port:
            asked = {"Connection": "Upgrade", "Upgrade": "websocket"}
            client = Client(port).send(post(path, {}, asked) + bytes(100_000))
            status, message = error(await read(client, all_of_it=True))
            assert status == 400 and "upgrade" in message
            client.close()
            # As Java's client asks, and goes on without.
            client = Client(port).send(post(path, {}, asked | {"Upgrade": "h2c"}))
            assert b"200 OK" in await read(client)
            assert b"200 OK" in await read(client.send(GET))
            client.close()
            client = Client(port).send(b"CONNECT here:80 HTTP/1.1\r\nHost: here:80\r\n\r\n")
            assert error(await read(client, all_of_it=True))[0] == 400
            client.close()

    uvloop.run(check())


def test_bodies_and_heads_in_any_pieces() -> None:
    """What ends in one piece and begins in it is told apart, wherever it is cut."""

    async def check() -> None:
        async def length(request: web.Request) -> web.StreamResponse:
            return web.Response(text=f"<{len(await request.read())}>")

        async with serving(length) as port:
            chunked = head("POST", "/", {"Transfer-Encoding": "chunked"})
            chunked += b"9c40\r\n" + bytes(40_000) + b"\r\n0\r\n\r\n"
            whole = (GET + body_of(bytes(50_000)) + chunked + large(30_000) + b"\r\n\r\n") * 3
            for size in (7000, 16_384, 16_385, 100_000, len(whole)):
                client = Client(port)
                for start in range(0, len(whole), size):
                    await asyncio.to_thread(client.send, whole[start : start + size])
                    await asyncio.sleep(0.002)
                got = b""
                while got.count(b"<") < 12:
                    more = await read(client)
                    assert more
                    got += more
                found = [int(part.partition(b">")[0]) for part in got.split(b"<")[1:]]
                assert found == [0, 50_000, 40_000, 0] * 3
                client.close()

    uvloop.run(check())


BROKEN = [
    b"\r\n\r\n\r\n\0\1\2\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"G\xe9T / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1e3\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",  # TLS
    b"GET /" + b"a" * (5 << 20) + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
]


@pytest.mark.parametrize("request_", BROKEN, ids=lambda request: repr(request[:30]))
def test_what_is_no_http_gets_a_sentence(request_: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def check(ask: Callable[..., Awaitable[bytes]]) -> None:
        status, message = error(await ask(request_))
        assert status in (400, 413, 431) and message and "\n" not in message

    with caplog.at_level(logging.DEBUG):
        bodies_check(check)
    assert not [r for r in caplog.records if r.exc_info]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head("POST", "/", {"Transfer-Encoding": "gzip, chunked"}) + b"0\r\n\r\n", 501),
        (head("POST", "/", {"Transfer-Encoding": "chunked, chunked"}) + b"0\r\n\r\n", 400),
        (head("GET", "/", {"Transfer-Encoding": "gzip, chunked"}) + b"0\r\n\r\n", 501),
        (head("GET", "/", {"Expect": "200-ok"}), 417),
        (head("POST", "/", {"Expect": "100-continue, x", "Content-Length": "1"}) + b"x", 417),
        (head("GET", "/", {"X-Request-Id": "a" * 257}), 400),
        (head("POST", "/", {"Content-Type": "y" + ";a" * 8000, "Content-Length": "0"}), 400),
        (b"OPTIONS / HTTP/1.1\r\nHost: a" + "\u0315\u0300".encode() * 15000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: xn--" + b"a" * 60000 + b"\r\n\r\n", 400),
        (head("GET", "/", {"X-Request-Id": "a\tb"}), 400),
        (head("GET", "/", {"X-Request-Id": "\u00e9"}), 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\nx-request-id: \xff\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\n\r\n", 505),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    ],
)
def test_heads_that_ask_for_what_is_not_served(request_: bytes, status: int) -> None:
    async def check(ask: Callable[..., Awaitable[bytes]]) -> None:
        answer = await ask(request_)
        got, message = error(answer)
        assert got == status and message

    bodies_check(check)


@pytest.mark.parametrize("target", ["/" * 66, "/a" * 65, "/?" + "a" * 8200])
def test_a_path_has_a_size(target: str) -> None:
    """aiohttp looks for a route at each of its parts: 65,000 held the loop up for 0.8 s."""

    async def check() -> None:
        async with serving(ok) as port:
            status, message = error(await read(Client(port).send(head("GET", target, {})), True))
            assert status == 414 and "a path" in message
            assert b"200 OK" in await read(Client(port).send(head("GET", "/a" * 60, {})))

    uvloop.run(check())


def test_a_body_must_not_be_frames_of_chunks() -> None:
    """Each costs the parser as much, whatever it brings: the connection ends after a few."""
    chunks = head("POST", "/v1/completions", {"Transfer-Encoding": "chunked"})

    async def check() -> None:
        async with serving(Bodies(30.0, 0).guard(ok)) as port:
            before = closed("chunks")
            client = Client(port).send(chunks)
            with contextlib.suppress(OSError):
                for _ in range(20):
                    client.send(b"1\r\nx\r\n" * 2000)
                    await asyncio.sleep(0)
            await soon(lambda: closed("chunks") == before + 1)
            status, message = error(await read(client, True))  # to its end, which comes soon
            assert status == 400 and message.endswith("its chunks are too small")
            client.close()
            large = Client(port).send(chunks)
            for _ in range(20):
                large.send(b"40\r\n" + b"x" * 64 + b"\r\n")
            large.send(b"0\r\n\r\n")
            assert b"200 OK" in await read(large)
            large.close()

    uvloop.run(check())


def test_chunked_is_taken_however_it_is_written() -> None:
    async def check(ask: Callable[..., Awaitable[bytes]]) -> None:
        for chunked in ("chunked", "Chunked", " chunked "):
            request = head("POST", "/", {"Transfer-Encoding": chunked})
            assert b"2 bytes" in await ask(request + b"2\r\nab\r\n0\r\n\r\n"), chunked

    bodies_check(check)


# ---- what is asked for ----


def test_as_many_connections_as_there_are_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [1024, 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.__setitem__(0, new[0]))
    assert places(0, reserve=64) == 480, "half of what is left stays for engines and files"
    assert places(480, reserve=64) == 480
    with pytest.raises(ConfigError, match="may open only 480"):
        places(481, reserve=64)
    limits[:] = 1024, 1 << 20
    assert places(20_000, reserve=64) == 20_000 and limits[0] == 65_535, "it asks for more"
    assert places(0, reserve=64) == 16_384


def test_options_that_cannot_work() -> None:
    for option, value in {
        "header_timeout": 0.0,
        "body_timeout": math.inf,
        "idle_timeout": -1.0,
        "max_connections": -1,
        "body_budget": -1,
    }.items():
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} must"):
            dataclasses.replace(Config(node="a"), **{option: value}).check()


def test_idle_time_as_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    monkeypatch.delenv(name, raising=False)
    assert connection_limits(Config()).idle_timeout == 75.0
    monkeypatch.setenv(name, "7")
    assert connection_limits(Config()).idle_timeout == 7.0
    assert connection_limits(Config(idle_timeout=3.0)).idle_timeout == 3.0
