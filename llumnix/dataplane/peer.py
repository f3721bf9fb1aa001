"""The peer channel: authenticated WebSockets, one for a pair of nodes, in either direction.

Nothing is sent to a node, and nothing is taken from it, before it has proved itself (`greeting`).
"""

import asyncio
import ipaddress
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from llumnix.cluster import NodeId, is_server_of
from llumnix.dataplane.frames import Codec, Frame, FrameError, Hello
from llumnix.dataplane.peer_link import HEARTBEAT, MAX_FRAME, OWN_HEARTBEAT, Link
from llumnix.dataplane.peer_proof import (
    PROOF,
    Door,
    GreetingError,
    Introduction,
    Key,
    Role,
    answer,
    convinced,
)
from llumnix.engine.base import EngineDead
from llumnix.late import Late
from llumnix.tasks import TaskSet

logger = logging.getLogger(__name__)

PATH = "/llumnix/peer"
APART = 1.0  # seconds between two warnings about strangers
AGAIN = 60.0  # seconds until the same one is given again


@dataclass(frozen=True, slots=True)
class ThisNode:
    """What the other nodes are told of this one; `life` is new with each start of its process."""

    node: NodeId
    address: str  # at which the others dial it
    version: str
    life: str = field(default_factory=lambda: secrets.token_hex(8))


class Receiver(Protocol):
    """Takes what comes over links."""

    async def take(self, link: Link, frame: Frame) -> None:
        """Serve a frame; the next one of its link waits for that."""

    def opened(self, link: Link) -> None:
        """There is a new link to a node."""

    async def closed(self, link: Link) -> None:
        """A link has ended."""


class Peers:
    """All links of this node: dials where it must, accepts what comes, remembers both."""

    def __init__(
        self,
        me: ThisNode,
        token: str,
        address_of: Callable[[NodeId], str | None],
        ssl: Any = None,
        own_node: tuple[NodeId, str] | None = None,
    ) -> None:
        """`own_node`: for an API server in a process of its own, the node that it belongs to, and
        the socket file by which that is reached."""
        self._own_node = own_node
        self._me = me
        self._key = Key(token)
        self._door = Door(self._key, me.node, me.life, me.address)
        self._address_of = address_of
        self._ssl = ssl
        self._links: dict[NodeId, Link] = {}
        self._running: set[Link] = set()  # with those beside: two nodes may dial at the same time
        self._dialling: dict[NodeId, asyncio.Lock] = {}
        self._tasks = TaskSet()
        self._session: aiohttp.ClientSession | None = None
        self._near: aiohttp.ClientSession | None = None  # to the own node
        self._closed = False
        self._complaint = ""
        self._complained = float("-inf")
        self._readable = False  # whether it has been said that links can be read on their way
        self._receiver: Late[Receiver] = Late("receiver of frames")

    def bind(self, receiver: Receiver) -> None:
        """Give all frames to it; it has to be there before the first link is."""
        self._receiver.bind(receiver)

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
                    link = await self._dial(node)
            except (aiohttp.ClientError, OSError, TimeoutError, FrameError) as error:
                detail = str(error) or type(error).__name__
                raise EngineDead(f"node {node} does not answer: {detail}") from error
            except GreetingError as error:
                self._complain(f"node {node} gets nothing: {error}")
                raise EngineDead(f"node {node} does not answer: {error}") from error
            self._tasks.spawn(self._serve(link), name=f"peer-{node}")
            return self._links[node]  # the one that is used from now on, if both have dialled

    async def accept_own(self, request: web.Request) -> web.StreamResponse:
        """Likewise, for this node's API servers, which come by a socket file that it has alone."""
        return await self.accept(request, own=True)

    async def accept(self, request: web.Request, own: bool = False) -> web.StreamResponse:
        """The HTTP handler of PATH: a challenge first, and a link for who has answered one."""
        try:
            who = Introduction.read(request.headers)
            if PROOF not in request.headers:
                return web.Response(status=401, headers=self._door.ask(who))
            proof = self._door.admit(who, request.headers)
            if is_server_of(who.node, self._me.node) is not own:
                raise GreetingError(f"{who.node} comes another way")
            self._has_place(who.node, who.life)
        except GreetingError as error:
            self._complain(f"refused a peer connection from {request.remote}: {error}")
            raise web.HTTPUnauthorized(text="wrong or missing proof of the cluster token") from None
        beat = OWN_HEARTBEAT if own else HEARTBEAT
        socket = web.WebSocketResponse(heartbeat=beat, max_msg_size=MAX_FRAME, compress=False)
        await socket.prepare(request)
        link = Link(socket, who.node, who.life, own)
        link.send(Hello(self._me.node, self._me.version, proof))
        self._keep(link, request.remote or "")
        await self._serve(link)
        return socket

    async def close(self) -> None:
        """Close every link and end every task; no link is opened again."""
        self._closed = True
        await asyncio.gather(*(link.close() for link in self._running))
        await self._tasks.wait()
        for session in (self._session, self._near):
            if session is not None:
                await session.close()

    async def _dial(self, node: NodeId) -> Link:
        """A new link. Raises GreetingError if what is there is not that node, and others."""
        address = self._address_of(node)
        if address is None:
            raise EngineDead(f"node {node} has left the cluster")
        if self._closed:
            raise EngineDead("this node has left the cluster")
        own = self._own_node is not None and node == self._own_node[0]
        session = self._own_session() if own else self._far_session()
        me = self._me
        who = Introduction(me.node, me.life, me.version, node, address)
        secure = self._ssl is not None and not own
        url = f"{'https' if secure else 'http'}://{address}{PATH}"
        ssl = self._ssl if secure else True
        asked = session.get(url, headers=who.headers(), ssl=ssl, allow_redirects=False)
        async with asked as reply:
            challenge = convinced(self._key, who, reply.status, reply.headers)
        headers = answer(self._key, who, challenge)
        beat = OWN_HEARTBEAT if own else HEARTBEAT
        socket = await session.ws_connect(
            url, headers=headers, heartbeat=beat, max_msg_size=MAX_FRAME, ssl=ssl
        )
        try:
            hello = await _hello(socket)
            self._key.check(hello.proof, Role.OPENED, who, challenge)
            self._has_place(node, challenge.life)
        except BaseException:
            await socket.close()
            raise
        link = Link(socket, node, challenge.life, own)
        self._keep(link, "" if own else address.rpartition(":")[0].strip("[]"))
        return link

    def _far_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return self._session

    def _own_session(self) -> aiohttp.ClientSession:
        assert self._own_node is not None
        if self._near is None:
            connector = aiohttp.UnixConnector(self._own_node[1])
            cookies = aiohttp.DummyCookieJar()
            self._near = aiohttp.ClientSession(connector=connector, cookie_jar=cookies)
        return self._near

    def _has_place(self, node: NodeId, life: str) -> None:
        """Who has the token can't take the place of a node that is connected."""
        if node == self._me.node:
            raise GreetingError(f"{node} is the name of this node itself")
        for link in self._running:
            if link.node == node and link.life != life and not link.closed:
                raise GreetingError(f"a node {node} is connected already, in another process")

    def _keep(self, link: Link, host: str) -> None:
        self._running.add(link)
        current = self._links.get(link.node)
        if current is None or current.closed:
            self._links[link.node] = link
        if self._ssl is None and not self._readable and not _is_here(host):
            self._readable = True
            logger.warning(
                "The link to node %s at %s is not encrypted: whoever is on the way can read and "
                "change prompts and answers (--ssl-certfile, --ssl-keyfile, --ssl-ca-certs).",
                link.node,
                host,
            )
        self._receiver().opened(link)

    def _complain(self, sentence: str) -> None:
        """Say it, but strangers must not fill the log."""
        now = time.monotonic()
        pause = AGAIN if sentence == self._complaint else APART
        if now - self._complained < pause:
            logger.debug("%s", sentence)
            return
        logger.warning("%s", sentence)
        self._complaint, self._complained = sentence, now

    async def _serve(self, link: Link) -> None:
        logger.info("connected to node %s", link.node)
        try:
            await link.run(self._receiver().take)
        finally:
            self._running.discard(link)
            if self._links.get(link.node) is link:
                del self._links[link.node]
            # Requests may have come over either of two links: one that ends ends both.
            for twin in [other for other in self._running if _same_process(other, link)]:
                await twin.close()
            await self._receiver().closed(link)
            logger.info("the connection to node %s ended", link.node)


async def _hello(socket: aiohttp.ClientWebSocketResponse) -> Hello:
    """The first frame of the node that was dialled. Raises FrameError."""
    message = await socket.receive()
    if message.type is not aiohttp.WSMsgType.BINARY:
        raise FrameError("it hung up without a greeting")
    hello = Codec().decode(message.data)
    if not isinstance(hello, Hello):
        raise FrameError("the first frame must be a Hello")
    return hello


def _same_process(one: Link, other: Link) -> bool:
    return (one.node, one.life) == (other.node, other.life)


def _is_here(host: str) -> bool:
    """Whether what goes there does not leave this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")
