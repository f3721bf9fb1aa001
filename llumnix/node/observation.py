"""What probes, operators and scrapes are told of a node."""

import asyncio
from collections.abc import Callable

from llumnix.actors.actor_supervision import Supervision
from llumnix.cluster import ClusterView, NodeId
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.frames import NodeNews
from llumnix.dataplane.peer import Peers
from llumnix.engine.base import EngineFacts
from llumnix.metrics import Snapshot
from llumnix.node.api_servers.api_server import ApiServer
from llumnix.node.api_servers.base import ApiServers
from llumnix.node.control_plane import ControlPlane
from llumnix.policy.priority_classes import Classes
from llumnix.policy.scaling import mean_freeness

FOR_EVER = 1e9  # seconds, for the age of a view that was never proven current
SCRAPE_SECONDS = 10.0  # for which a scrape of the metrics waits for the loop


class Observation:
    """Looks at the parts of a node; made on its loop."""

    def __init__(
        self,
        node: NodeId,
        classes: Classes,
        control: ControlPlane,
        supervision: Supervision,
        exchange: Exchange,
        peers: Peers,
        servers: Callable[[], ApiServers],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._node = node
        self._classes = classes
        self._control = control
        self._supervision = supervision
        self._exchange = exchange
        self._peers = peers
        self._servers = servers
        self.server: ApiServer | None = None  # that in this process; else each counts in its own

    def fault(self) -> str:
        """What has died or hangs of the parts that nothing restarts; empty if nothing."""
        return self._servers().fault or self._supervision.fault or self._control.standstill()

    def facts(self) -> EngineFacts | None:
        """What an instance of this node knows of itself, if one is up."""
        return next((h.facts for h in self._exchange.hosted.values() if h.facts), None)

    def news(self) -> NodeNews:
        """What the API servers in other processes are told, but for what has changed."""
        age = min(self._control.registry.age, FOR_EVER)
        return NodeNews(
            None, False, age, self.fault(), self._control.alarms.now(), False, self.facts()
        )

    def view_and_age(self) -> tuple[ClusterView, float]:
        """The cluster as this node sees it, and for how many seconds it has."""
        return self._control.view(), self._control.registry.age

    def scraped(self) -> Snapshot:
        """The facts for the metrics; called on the thread that writes them, or on the loop."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is self._loop:  # vLLM reads them there, for a header with a node's load
            return self._snapshot()

        async def look() -> Snapshot:
            return self._snapshot()

        looking = asyncio.run_coroutine_threadsafe(look(), self._loop)
        return looking.result(SCRAPE_SECONDS)

    def _snapshot(self) -> Snapshot:
        view, age = self.view_and_age()
        return Snapshot(
            node=self._node,
            view=view,
            view_age=age,
            loads=tuple(h.load() for h in self._exchange.hosted.values() if h.facts),
            counts=self.server.counts if self.server is not None else None,
            peers=self._peers.open,
            classes={p: made.name for p, made in self._classes.by_priority.items()},
            mean_freeness=mean_freeness(view, self._classes),
        )
