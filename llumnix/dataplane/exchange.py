"""The exchange: gets a frame to the node that hosts an instance, and serves those that arrive.

An instance of this node is called directly, any other one over the peer link to its node.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from llumnix.cluster import InstanceId, NodeId
from llumnix.dataplane.frames import (
    Call,
    Cancel,
    Frame,
    HandOver,
    Lost,
    News,
    Outputs,
    Reply,
    Submit,
)
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import Origin
from llumnix.dataplane.peer import Link, Peers
from llumnix.engine.base import EngineDead, EngineError

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


class Exchange:
    """Carries requests to instances, near and far; lives on the node's event loop."""

    def __init__(self, node: NodeId, peers: Peers) -> None:
        self.node = node
        self.hosted: dict[InstanceId, HostedInstance] = {}
        self.procedures: dict[str, Procedure] = {}
        self.on_outputs: Callable[[News], None] = lambda frame: None
        self.on_node_lost: list[Callable[[NodeId, str], None]] = []
        self.on_node_found: Callable[[NodeId], None] = lambda node: None
        self._peers = peers
        self._tasks: set[asyncio.Task[Any]] = set()
        peers.on_frame = self._on_frame
        peers.on_close = self._on_close
        peers.on_open = lambda node: self.on_node_found(node)

    async def submit(self, node: NodeId, home: Origin, frame: Submit) -> None:
        """Have a request run. Raises EngineDead if its node can't be reached."""
        if node == self.node:
            await self._submit(home, frame)
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

    async def close(self) -> None:
        """End all links and tasks; the hosted instances are stopped by their owners."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._peers.close()

    async def _on_frame(self, link: Link, frame: Frame) -> None:
        match frame:
            case Outputs() | Lost() | HandOver():
                self.on_outputs(frame)
            case Submit():
                await self._submit(link, frame)
            case Cancel():
                await self._cancel(frame)
            case Call():
                # In a task of its own: a slow call must not hold up the frames behind it.
                self._spawn(self._reply(link, frame))
            case _:
                logger.warning("ignored a %s from node %s", type(frame).__name__, link.node)

    async def _on_close(self, link: Link) -> None:
        for hosted in list(self.hosted.values()):
            await hosted.evict(link)
        for tell in self.on_node_lost:
            tell(link.node, f"lost the connection to node {link.node}")

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
            if frame.method not in CALLABLE_BY_PEERS and frame.method not in self.procedures:
                raise EngineError(f"a peer may not call {frame.method}")
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

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
