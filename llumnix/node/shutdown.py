"""The end of a node: what runs there moves away or ends, then the engines, then who needed them."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from pykka import ActorDeadError

from llumnix.actors.instance_supervisor import NodeActor
from llumnix.cluster import NodeId
from llumnix.dataplane.exchange import Exchange
from llumnix.node.actor_system import Acting
from llumnix.node.api_servers.base import ApiServers, Open

logger = logging.getLogger(__name__)

SUCCESSOR_SECONDS = 1.0  # for which the successor of an actor that has died is waited for
LINK_SECONDS = 2.0  # in which a node that leaves connects to the others
HALT_SECONDS = 30.0  # for all engines to end
POLL = 0.05  # seconds between looks while something ends

R = TypeVar("R")


class Shutdown:
    """Drains a node before it stops; lives on its loop."""

    def __init__(self, acting: Acting, exchange: Exchange, servers: ApiServers) -> None:
        self._acting = acting
        self._exchange = exchange
        self._servers = servers

    async def reach(self, others: Iterable[NodeId], within: float) -> None:
        """Have links to the nodes that may take what runs here, if anything does.

        Any of them may lead, and this node can't be dialled soon.
        """
        if (await self._left()).total:
            await self._exchange.reach(others, min(LINK_SECONDS, within))

    async def drain(self, deadline: float) -> None:
        """Wait until nothing runs here any more, until the deadline on the loop's clock."""
        await self._asked(NodeActor.drain_all)
        while (left := await self._left()).total:
            if asyncio.get_running_loop().time() >= deadline:
                names = ", ".join(sorted(set(left.requests))) or "none by name"
                logger.warning("the drain timeout ends %d requests: %s", left.total, names)
                return
            await asyncio.sleep(POLL)

    async def _left(self) -> Open:
        """What still runs here: of this node's clients, and at its instances for others."""
        here = [r.request_id for h in self._exchange.hosted.values() for r in h.requests]
        opened = await self._servers.open()
        return Open(opened.running, [*opened.requests, *here])

    async def halt(self) -> None:
        """Stop the engines, then what stood on them."""
        loop = asyncio.get_running_loop()
        left = await self._asked(NodeActor.halt)
        deadline = loop.time() + HALT_SECONDS
        while left and loop.time() < deadline:
            await asyncio.sleep(POLL)
            left = await self._asked(NodeActor.left)
        if left is None:
            hosted = list(self._exchange.hosted.values())
            await asyncio.gather(*(instance.stop(0.0) for instance in hosted))
        await self._servers.close()

    async def _asked(self, method: Callable[[NodeActor], R]) -> R | None:
        """What the instances' supervisor answers; None if it has died for good."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SUCCESSOR_SECONDS
        while True:
            try:
                return await self._acting.supervise.ask(method)
            except ActorDeadError:  # of which there may be a successor at once
                if loop.time() >= deadline:
                    logger.error("the supervisor of the instances is dead: no %s", method.__name__)
                    return None
            await asyncio.sleep(POLL)
