"""The exchange: gets a frame to the node that hosts an instance, and serves those that arrive.

An instance of this node is called directly, any other one over the peer link to its node.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from llumnix.cluster import InstanceId, NodeId, slot_at
from llumnix.dataplane.frames import (
    Call,
    Cancel,
    Frame,
    HandOver,
    Lost,
    NodeNews,
    Outputs,
    Reply,
    Submit,
)
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import Origin
from llumnix.dataplane.peer import Peers
from llumnix.dataplane.peer_link import Link
from llumnix.engine.base import EngineDead, EngineError
from llumnix.late import Late
from llumnix.tasks import TaskSet

logger = logging.getLogger(__name__)

# What a peer may call: nothing here takes code, or a function's name, as an argument.
CALLABLE_BY_PEERS = frozenset(
    {"get_supported_tasks", "add_lora", "remove_lora", "list_loras", "pin_lora", "profile"}
    | {"reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"}
    | {"sleep", "wake_up", "is_sleeping"}
    | {"pause_scheduler", "resume_scheduler", "is_scheduler_paused"}
)

# A procedure that peers may call beside an engine's utilities; it gets the instance and arguments.
Procedure = Callable[..., Awaitable[Any]]


class ApiServer(Origin, Protocol):
    """The API server of a node: it gets what comes for its requests, and hears of other nodes."""

    def node_lost(self, node: NodeId, reason: str) -> None:
        """The connection to a node has ended, for this reason."""

    def node_found(self, link: Link) -> None:
        """There is a new connection to a node."""


class Exchange:
    """Carries requests to instances, near and far; lives on its process's event loop."""

    def __init__(self, node: NodeId, peers: Peers, host: NodeId | None = None) -> None:
        """`node`: by which name others know this process. `host`: the node that it belongs to, if
        it hosts no instances itself: an API server in a process of its own."""
        self.node = node
        self._host = node if host is None else host
        self.hosted: dict[InstanceId, HostedInstance] = {}
        self.procedures: dict[str, Procedure] = {}
        # Others than the node's API server that are told of a lost connection, and why.
        self.on_node_lost: list[Callable[[NodeId, str], None]] = []
        self.on_news: Callable[[NodeNews], None] | None = None  # of the node of this API server
        # Procedures between a node and its API servers, which no other node may call.
        self.own_procedures: dict[str, Procedure] = {}
        self._home: Late[ApiServer] = Late("API server")
        self._peers = peers
        self._tasks = TaskSet()
        peers.bind(self)

    def bind(self, home: ApiServer) -> None:
        """Serve the node's API server, which has to be there before anything is carried."""
        self._home.bind(home)

    async def submit(self, node: NodeId, frame: Submit) -> None:
        """Have a request of this API server run. Raises EngineDead if its node can't be reached."""
        if node == self.node:
            await self._submit(self._home(), frame)
        else:
            (await self._peers.link(node)).send(frame)

    async def cancel(self, node: NodeId, frame: Cancel) -> None:
        """End requests. Raises EngineDead if the node can't be reached: then they ended anyway."""
        if node == self.node:
            await self._cancel(frame)
        else:
            (await self._peers.link(node)).send(frame)

    async def call(
        self,
        node: NodeId,
        instance: InstanceId,
        method: str,
        args: tuple[Any, ...],
        within: float | None,
    ) -> Any:
        """Call a utility method of an instance's engine, for so many seconds; None: until it ends.

        Raises EngineError, TimeoutError.
        """
        async with asyncio.timeout(within):
            if node == self.node:
                return await self._call(instance, method, args)
            return await (await self._peers.link(node)).call(instance, method, args)

    async def reach(self, nodes: Iterable[NodeId], within: float) -> None:
        """Have a link to each of these nodes, as far as that is possible in so many seconds."""
        links = [asyncio.ensure_future(self._peers.link(node)) for node in nodes]
        if links:
            await asyncio.wait(links, timeout=within)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    def slot(self, instance: InstanceId) -> int | None:
        """The slot of an instance of this node, as its name says; None for those of all others."""
        return slot_at(self._host, instance)

    async def close(self) -> None:
        """End all links and tasks; the hosted instances are stopped by their owners."""
        await self._tasks.close()
        await self._peers.close()

    async def take(self, link: Link, frame: Frame) -> None:
        """Serve a frame that has come over a link."""
        match frame:
            case Outputs():
                stats = frame.stats if link.own else None
                self._home().deliver(frame, stats)
            case Lost() | HandOver():
                self._home().deliver(frame)
            case Submit():
                await self._submit(link, frame)
            case Cancel():
                await self._cancel(frame)
            case Call():
                # In a task of its own: a slow call must not hold up the frames behind it.
                self._tasks.spawn(self._reply(link, frame), name=f"reply-{frame.method}")
            case NodeNews() if link.own and self.on_news is not None:
                self.on_news(frame)
            case _:
                logger.warning("ignored a %s from node %s", type(frame).__name__, link.node)

    def opened(self, link: Link) -> None:
        """There is a new link to a node."""
        self._home().node_found(link)

    async def closed(self, link: Link) -> None:
        """A link has ended, and so has all that came over it."""
        for hosted in list(self.hosted.values()):
            await hosted.evict(link)
        reason = f"lost the connection to node {link.node}"
        self._home().node_lost(link.node, reason)
        for tell in self.on_node_lost:
            tell(link.node, reason)

    async def _submit(self, origin: Origin, frame: Submit) -> None:
        hosted = self.hosted.get(frame.instance)
        if hosted is None:
            ids = [frame.request.request_id]
            origin.deliver(Lost(frame.instance, [frame.epoch], ids, f"{frame.instance} is gone"))
        else:
            await hosted.submit(origin, frame)

    async def _cancel(self, frame: Cancel) -> None:
        if hosted := self.hosted.get(frame.instance):
            await hosted.cancel(frame.request_ids, frame.epochs)

    async def _call(self, instance: InstanceId, method: str, args: tuple[Any, ...]) -> Any:
        if (procedure := self.procedures.get(method)) is not None:
            return await procedure(instance, *args)
        hosted = self.hosted.get(instance)
        if hosted is None:
            raise EngineDead(f"instance {instance} is not on node {self.node}")
        return await hosted.engine.call(method, *args)

    async def _reply(self, link: Link, frame: Call) -> None:
        try:
            known = frame.method in CALLABLE_BY_PEERS or frame.method in self.procedures
            if not (known or link.own):
                raise EngineError(f"a peer may not call {frame.method}")
            if link.own and (own := self.own_procedures.get(frame.method)) is not None:
                result = await own(frame.instance, *frame.args)
            else:
                result = await self._call(frame.instance, frame.method, tuple(frame.args))
            reply = Reply(frame.id, result)
        except EngineError as error:
            reply = Reply(frame.id, error=str(error))
        except TimeoutError:
            reply = Reply(frame.id, error=f"node {self.node} did not do its {frame.method} in time")
        except Exception as error:  # the caller must not wait until its deadline
            logger.exception("the call of %s by node %s failed", frame.method, link.node)
            reply = Reply(frame.id, error=f"internal error: {type(error).__name__}")
        if link.closed:
            return
        try:
            link.send(reply)
        except EngineError as error:
            link.send(Reply(frame.id, error=str(error)))


class Cancels:
    """Has requests ended where they run, one call for each instance and turn of the loop.

    When a thousand clients leave at once, an instance gets some dozens of messages, not a thousand.
    """

    def __init__(self, cancel: Callable[[InstanceId, list[str]], Awaitable[None]]) -> None:
        self._cancel = cancel
        self._pending: dict[InstanceId, list[str]] = {}
        self._next: asyncio.Task[None] | None = None  # sends what is pending
        self._sending = TaskSet()

    def add(self, requests: Iterable[tuple[InstanceId, str]]) -> asyncio.Task[None]:
        """End requests, each at its instance; what is returned is done when that has been sent.

        Others wait for it too, so nobody may cancel it.
        """
        for instance, request_id in requests:
            self._pending.setdefault(instance, []).append(request_id)
        if self._next is None:
            self._next = self._sending.spawn(self._send(), name="cancels")
        return self._next

    async def _send(self) -> None:
        pending, self._pending = self._pending, {}
        self._next = None
        for instance, request_ids in pending.items():
            await self._cancel(instance, request_ids)
