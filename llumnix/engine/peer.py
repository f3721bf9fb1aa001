"""The peer channel: one authenticated WebSocket for a pair of nodes, either of which may speak.

A link belongs to the node loop. Sending never waits: frames go into a bounded queue that one task
writes out, so a stalled peer costs its own link and nothing else.
"""

import asyncio
import contextlib
import hmac
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.cluster import InstanceId, NodeId
from llumnix.engine.base import EngineDead, EngineError
from llumnix.engine.frames import (
    AnyFrame,
    Call,
    Codec,
    Frame,
    FrameError,
    Hello,
    News,
    Reply,
)

logger = logging.getLogger(__name__)

PATH = "/llumnix/peer"
HEARTBEAT = 2.0  # seconds between pings; a peer that misses one answer is cut off
QUEUE_FRAMES = 65_536  # a peer this far behind is cut off
MAX_FRAME = 256 * 2**20  # bytes; images and embeddings travel in requests

Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse
OnFrame = Callable[["Link", Frame], Awaitable[None]]


class Link:
    """One open connection to another node; also the origin of the requests that came over it."""

    def __init__(self, socket: Socket, node: NodeId) -> None:
        self._socket = socket
        self._node = node
        self._codec = Codec()
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self.closed = False

    @property
    def node(self) -> NodeId:
        """The node at the other end."""
        return self._node

    def deliver(self, frame: News, stats: SchedulerStats | None = None) -> None:
        """Send outputs back to where their requests came from."""
        if self.closed:
            return
        try:
            self.send(frame)
        except EngineError as error:
            # Positions would be missing for good: the other end has to start those requests anew.
            logger.error("closing the connection to node %s: %s", self._node, error)
            self.closed = True
            self._wake.set()

    def send(self, frame: Frame) -> None:
        """Queue a frame. Raises EngineDead if the link is closed, EngineError if it can't go."""
        if self.closed:
            raise EngineDead(f"the connection to node {self._node} is closed")
        try:
            message = self._codec.encode(frame)
        except (TypeError, ValueError, OverflowError) as error:
            raise EngineError(f"this cannot be sent to node {self._node}: {error}") from error
        if len(message) >= MAX_FRAME:  # for which the other end would close the connection
            large = f"{len(message) >> 20} MiB are too much for one message"
            raise EngineError(f"this cannot be sent to node {self._node}: {large}")
        if len(self._queue) >= QUEUE_FRAMES:
            logger.error("node %s is %d frames behind; cutting it off", self._node, QUEUE_FRAMES)
            self.closed = True
        else:
            self._queue.append(message)
        self._wake.set()

    async def call(self, instance: InstanceId, method: str, args: tuple[Any, ...]) -> Any:
        """Call a utility method of an instance at the other end. Raises EngineError."""
        number = next(self._ids)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self.send(Call(number, instance, method, list(args)))
            return await future
        finally:
            del self._calls[number]

    async def run(self, on_frame: OnFrame) -> None:
        """Carry frames both ways until the connection ends, for whatever reason."""
        writer = asyncio.create_task(self._write(), name=f"peer-writer-{self._node}")
        try:
            async for message in self._socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    break
                frame = self._codec.decode(message.data)
                if isinstance(frame, Reply):
                    self._answer(frame)
                else:
                    await on_frame(self, frame)
        except FrameError as error:
            logger.error("closing the connection to node %s: %s", self._node, error)
        except ConnectionError as error:  # a ping is answered where the other end is gone already
            logger.debug("the connection to node %s broke: %s", self._node, error)
        finally:
            await self._end(writer)

    async def close(self) -> None:
        """Close the connection; run() returns soon after."""
        self.closed = True
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._socket.close(), timeout=2.0)

    async def _end(self, writer: "asyncio.Task[None]") -> None:
        self.closed = True
        self._wake.set()
        writer.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError, aiohttp.ClientError):
            await writer
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDead(f"lost the connection to node {self._node}"))
        await self.close()

    async def _write(self) -> None:
        while not self.closed:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                await self._socket.send_bytes(self._queue.popleft())
        await self._socket.close()

    def _answer(self, reply: Reply) -> None:
        future = self._calls.get(reply.id)
        if future is None or future.done():
            return
        if reply.error is None:
            future.set_result(reply.result)
        else:
            future.set_exception(EngineError(reply.error))


class Peers:
    """All links of this node: dials where it must, accepts what comes, remembers both."""

    def __init__(
        self,
        node: NodeId,
        version: str,
        token: str,
        address_of: Callable[[NodeId], str | None],
        ssl: Any = None,
    ) -> None:
        self._hello = Hello(node, version)
        self._token = token
        self._address_of = address_of
        self._ssl = ssl
        self._links: dict[NodeId, Link] = {}
        self._running: set[Link] = set()  # with those beside: two nodes may dial at the same time
        self._dialling: dict[NodeId, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self.on_frame: OnFrame
        self.on_close: Callable[[Link], Awaitable[None]]
        self.on_open: Callable[[NodeId], None] = lambda node: None

    @property
    def open(self) -> int:
        """How many links are open."""
        return len(self._links)

    async def link(self, node: NodeId, timeout: float = 3.0) -> Link:
        """The link to a node, dialled if there is none. Raises EngineDead."""
        async with self._dialling.setdefault(node, asyncio.Lock()):
            link = self._links.get(node)
            if link is not None and not link.closed:
                return link
            try:
                async with asyncio.timeout(timeout):
                    socket = await self._dial(node)
            except (aiohttp.ClientError, OSError, TimeoutError, FrameError) as error:
                detail = str(error) or type(error).__name__
                raise EngineDead(f"node {node} does not answer: {detail}") from error
            link = Link(socket, node)
            self._keep(link)
            task = asyncio.create_task(self._serve(link), name=f"peer-{node}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return self._links[node]  # the one that is used from now on, if both have dialled

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """The HTTP handler of PATH: refuse who does not know the cluster's token."""
        given = request.headers.get("Authorization", "")
        expected = f"Bearer {self._token}".encode()
        if not hmac.compare_digest(given.encode(errors="surrogateescape"), expected):
            logger.warning("refused a peer connection from %s: wrong token", request.remote)
            raise web.HTTPUnauthorized(text="wrong or missing cluster token")
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT, max_msg_size=MAX_FRAME, compress=False)
        await socket.prepare(request)
        try:
            hello = await _greeting(socket)
        except (FrameError, TimeoutError) as error:
            logger.warning("refused a peer connection from %s: %r", request.remote, error)
            await socket.close()
            return socket
        link = Link(socket, hello.node)
        link.send(self._hello)
        self._keep(link)
        await self._serve(link)
        return socket

    async def close(self) -> None:
        """Close every link and end every task; no link is opened again."""
        self._closed = True
        await asyncio.gather(*(link.close() for link in self._running))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _dial(self, node: NodeId) -> aiohttp.ClientWebSocketResponse:
        address = self._address_of(node)
        if address is None:
            raise EngineDead(f"node {node} has left the cluster")
        if self._closed:
            raise EngineDead("this node has left the cluster")
        if self._session is None:
            self._session = aiohttp.ClientSession()
        scheme = "https" if self._ssl else "http"
        socket = await self._session.ws_connect(
            f"{scheme}://{address}{PATH}",
            headers={"Authorization": f"Bearer {self._token}"},
            heartbeat=HEARTBEAT,
            max_msg_size=MAX_FRAME,
            ssl=self._ssl or True,
        )
        try:
            await socket.send_bytes(Codec().encode(self._hello))
            await _greeting(socket)  # the token was right and it is up
        except BaseException:
            await socket.close()
            raise
        return socket

    def _keep(self, link: Link) -> None:
        self._running.add(link)
        current = self._links.get(link.node)
        if current is None or current.closed:
            self._links[link.node] = link
        self.on_open(link.node)

    async def _serve(self, link: Link) -> None:
        logger.info("connected to node %s", link.node)
        try:
            await link.run(self.on_frame)
        finally:
            self._running.discard(link)
            if self._links.get(link.node) is link:
                del self._links[link.node]
            # Requests may have come over either of two links: one that ends ends both.
            for twin in [other for other in self._running if other.node == link.node]:
                await twin.close()
            await self.on_close(link)
            logger.info("the connection to node %s ended", link.node)


async def _greeting(socket: Socket) -> Hello:
    """The first frame of the other end. Raises FrameError, TimeoutError."""
    message = await socket.receive(timeout=3.0)
    if message.type is not aiohttp.WSMsgType.BINARY:
        raise FrameError("it hung up without a greeting")
    hello = Codec().decode(message.data)
    if not isinstance(hello, Hello):
        raise FrameError("the first frame must be a Hello")
    return hello


__all__ = ["PATH", "AnyFrame", "Link", "Peers"]
