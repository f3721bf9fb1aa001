"""TCP proxies in front of nodes and etcd members, which cut, stall or delay what passes."""

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
CHUNK = 64 * 1024  # bytes
RESENT = 0.4  # seconds until TCP sends again what was lost on a slow link

Pair = frozenset[str]


@dataclass(frozen=True)
class Link:
    """How a link between two nodes, or a node and etcd, behaves."""

    cut: bool = False  # connections end, and none is made
    stalled: bool = False  # connections stay open, and nothing passes
    delay: float = 0.0  # seconds, each way
    loss: float = 0.0  # share of the pieces that come later than the delay

    def late(self, draw: random.Random) -> float:
        """Seconds that the next piece takes."""
        return self.delay + (RESENT if draw.random() < self.loss else 0.0)


FAST = Link()


class Proxies:
    """Proxies on a loop in a thread of its own."""

    def __init__(self, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        self._links: dict[Pair, Link] = {}
        self._changed = asyncio.Event()
        self._writers: dict[Pair, set[asyncio.StreamWriter]] = {}
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        # The node to whose process a connection from this port belongs.
        self.owner: Callable[[int], str | None] = lambda port: None

    def __enter__(self) -> "Proxies":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)

    def front(self, name: str, port: int, caller: str | None = None) -> int:
        """Stand in front of a port from now on; the port of the proxy.

        All who connect to it are the `caller`, if there is one, else the `owner` tells who.
        """
        return int(self._do(self._listen(name, port, caller)))

    def set(self, one: str, other: str, link: Link) -> None:
        """Have a link between two nodes behave so, with all connections that are open."""
        self._do(self._set(frozenset((one, other)), link))

    def reset(self) -> None:
        """All links are fast again."""
        for pair in list(self._links):
            self._do(self._set(pair, FAST))

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, name: str, port: int, caller: str | None) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                source = writer.get_extra_info("peername")[1]
                who = caller or await asyncio.to_thread(self.owner, source) or "?"
                await self._serve(frozenset((name, who)), port, reader, writer)
            writer.close()

        server = await asyncio.start_server(serve, HOST, 0)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def _set(self, pair: Pair, link: Link) -> None:
        self._links[pair] = link
        if link.cut:
            for writer in self._writers.get(pair, ()):
                writer.transport.abort()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _serve(
        self, pair: Pair, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self._links.get(pair, FAST).cut:
            return
        there_reader, there_writer = await asyncio.open_connection(HOST, port)
        ends = {writer, there_writer}
        self._writers.setdefault(pair, set()).update(ends)
        ways = [
            asyncio.create_task(self._carry(pair, reader, there_writer)),
            asyncio.create_task(self._carry(pair, there_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writers[pair] -= ends
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            there_writer.close()

    async def _carry(
        self, pair: Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry one direction; pieces keep their order, and many may be on their way."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1024)
        sender = asyncio.create_task(self._send(pair, pieces, writer))
        try:
            while data := await reader.read(CHUNK):
                late = self._links.get(pair, FAST).late(self._draw)
                await pieces.put((self._loop.time() + late, data))
            await pieces.put((0.0, b""))
            await sender
        finally:
            sender.cancel()

    async def _send(
        self, pair: Pair, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due, data = await pieces.get()
            if not data:
                return
            await asyncio.sleep(due - self._loop.time())
            while self._links.get(pair, FAST).stalled:
                await self._changed.wait()
            writer.write(data)
            await writer.drain()


def holder(port: int, pids: dict[int, str]) -> str | None:
    """The one of these processes that has a connection from this local port."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].partition(":")[2], 16) == port:
            inodes.add(f"socket:[{fields[9]}]")
    for pid, name in pids.items():
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{descriptor}") in inodes:
                        return name
    return None
