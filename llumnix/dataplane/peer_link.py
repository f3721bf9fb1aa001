"""One link of the peer channel: a WebSocket to another node, over which either may speak.

A link belongs to the node loop. Sending never waits: frames go into a bounded queue that one task
writes out, so a stalled peer costs its own link and nothing else.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.cluster import InstanceId, NodeId
from llumnix.dataplane.frames import Call, Codec, Frame, FrameError, Lost, News, Outputs, Reply
from llumnix.engine.base import EngineDead, EngineError

logger = logging.getLogger(__name__)

HEARTBEAT = 2.0  # seconds between pings; a peer that misses one answer is cut off
# Between a node and its own API servers: of a process of this machine that has died the kernel
# tells at once, and one that opens vLLM's frontend has a busy loop for seconds.
OWN_HEARTBEAT = 15.0
QUEUE_FRAMES = 65_536  # a peer this far behind is cut off
MAX_FRAME = 256 * 2**20  # bytes; images and embeddings travel in requests

Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse
OnFrame = Callable[["Link", Frame], Awaitable[None]]


class Link:
    """One open connection to another node; also the origin of the requests that came over it."""

    def __init__(self, socket: Socket, node: NodeId, life: str = "", own: bool = False) -> None:
        """`own`: whether the other end is the same node, or one of its API servers."""
        self.own = own
        self._socket = socket
        self._node = node
        self.life = life  # of the process at the other end; a node has another after a restart
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
        if stats is not None and isinstance(frame, Outputs):
            frame.stats = stats
        try:
            self.send(frame)
        except EngineError as error:
            if isinstance(frame, Outputs):
                self._deliver_each(frame)
            else:
                self._give_up(error)

    def _deliver_each(self, frame: Outputs) -> None:
        """Send the outputs of a frame that can't go one by one: what can't is its request's end."""
        instance, timestamp = frame.instance, frame.timestamp
        each = zip(frame.outputs, frame.epochs, frame.positions, strict=True)
        for output, epoch, position in each:
            try:
                self.send(Outputs(instance, timestamp, [epoch], [position], [output]))
            except EngineError as error:
                lost = Lost(instance, [epoch], [output.request_id], str(error), retry=False)
                try:
                    self.send(lost)
                except EngineError as again:
                    self._give_up(again)
                    return

    def _give_up(self, error: EngineError) -> None:
        """Positions would be missing for good: the other end has to start those requests anew."""
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
