"""What probes, operators and scrapes are told of a node."""

import asyncio

from llumnix.actors.supervision import Supervision
from llumnix.cluster import ClusterView, NodeId
from llumnix.metrics import Snapshot
from llumnix.node.control_plane import ControlPlane
from llumnix.node.request_path import RequestPath
from llumnix.policy.priority_classes import Classes
from llumnix.policy.scaling import mean_freeness

SCRAPE_SECONDS = 10.0  # for which a scrape of the metrics waits for the loop


class Observation:
    """Looks at the parts of a node; made on its loop."""

    def __init__(
        self,
        node: NodeId,
        classes: Classes,
        control: ControlPlane,
        supervision: Supervision,
        path: RequestPath,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._node = node
        self._classes = classes
        self._control = control
        self._supervision = supervision
        self._path = path

    def fault(self) -> str:
        """What has died or hangs of the parts that nothing restarts; empty if nothing."""
        frontend = self._path.opening.frontend
        if frontend is not None and not frontend.sound:
            return "vLLM's frontend has died"
        return self._supervision.fault or self._control.standstill()

    def view_and_age(self) -> tuple[ClusterView, float]:
        """The cluster as this node sees it, and for how many seconds it has."""
        return self._control.view(), self._control.registry.age

    def scraped(self) -> Snapshot:
        """The facts for the metrics; called on the thread that writes them."""

        async def look() -> Snapshot:
            return self._snapshot()

        looking = asyncio.run_coroutine_threadsafe(look(), self._loop)
        return looking.result(SCRAPE_SECONDS)

    def _snapshot(self) -> Snapshot:
        view, age = self.view_and_age()
        client = self._path.client
        return Snapshot(
            node=self._node,
            view=view,
            view_age=age,
            loads=tuple(h.load() for h in self._path.exchange.hosted.values() if h.facts),
            open_requests=len(client.ledger),
            dispatched=dict(client.placer.dispatched),
            dropped={str(k): v for k, v in client.ledger.dropped.items()},
            peers=self._path.peers.open,
            classes={p: made.name for p, made in self._classes.by_priority.items()},
            mean_freeness=mean_freeness(view, self._classes),
        )
