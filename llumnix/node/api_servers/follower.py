"""What an API server in a process of its own knows of its node, as that tells it."""

import logging
import time
from collections.abc import Callable

from llumnix.cluster import ClusterView, NodeId
from llumnix.control.view_change import applied
from llumnix.dataplane.frames import NodeNews
from llumnix.engine.base import EngineFacts

logger = logging.getLogger(__name__)


class Follower:
    """Keeps the last that was heard; lives on the API server's loop.

    While the node is silent the last view stays: what it does not know of is not lost.
    """

    def __init__(self, node: NodeId, address: str) -> None:
        """`address`: where the node itself is dialled, as no view is there at first."""
        self._node = node
        self._address = address
        self._view = ClusterView()
        self._heard = float("-inf")  # monotonic
        self._age = float("inf")
        self.news: NodeNews | None = None  # the last
        self.astray = False  # whether the view lacks a change, and has to be told anew
        self.on_view: Callable[[ClusterView], None] = lambda view: None

    def heard(self, news: NodeNews) -> None:
        """Take in what the node has said."""
        self.news, self._age, self._heard = news, news.age, time.monotonic()
        if news.change is None:
            return
        try:
            before = ClusterView() if news.anew else self._view
            self._view = applied(before, news.change)
        except ValueError as error:
            logger.error("the node tells of a cluster that can't be read: %s", error)
            self.astray = True
            return
        self.astray = False
        self.on_view(self._view)

    def view(self) -> ClusterView:
        """The cluster as the node last told of it."""
        return self._view

    def view_and_age(self) -> tuple[ClusterView, float]:
        """It, and for how many seconds it has been so."""
        return self._view, self._age + time.monotonic() - self._heard

    def fault(self) -> str:
        """What of the node has died or hangs; empty if nothing."""
        return self.news.fault if self.news else ""

    def warnings(self) -> list[dict[str, object]]:
        """Of what was found wrong in etcd lately."""
        return self.news.warnings if self.news else []

    def facts(self) -> EngineFacts | None:
        """What an instance of the node knows of itself, if one is up."""
        return self.news.facts if self.news else None

    def address_of(self, node: NodeId) -> str | None:
        """Where a node is dialled; None if it is not in the cluster."""
        if node == self._node:
            return self._address
        info = self._view.nodes.get(node)
        return (info.peer_address or info.address) if info else None
