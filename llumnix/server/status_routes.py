"""The routes by which operators and probes look at a node."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from llumnix import __version__
from llumnix.cluster import ClusterView, NodeId


@dataclass
class Standing:
    """Whether this node answers requests at once, and the sentence that says why not."""

    serving: bool = False
    sentence: str = "the node is starting: no instance is ready yet"
    # Whether requests may come though none can be answered now: an instance starts that will.
    awaiting: bool = False

    @property
    def admits(self) -> bool:
        """Whether clients' requests are taken: to be answered at once, or to wait."""
        return self.serving or self.awaiting


async def scrape_process() -> bytes:
    """The metrics of this process; they are long, so they are written beside the loop."""
    return await asyncio.to_thread(generate_latest)


class Admin:
    """Probes, the status page and the metrics of one node."""

    def __init__(
        self,
        node: NodeId,
        standing: Standing,
        view: Callable[[], tuple[ClusterView, float]],
        fault: Callable[[], str],
        warnings: Callable[[], list[dict[str, object]]] = list,
        scrape: Callable[[], Awaitable[bytes]] = scrape_process,
    ) -> None:
        """`scrape`: writes the metrics, in Prometheus's format."""
        self._node = node
        self._standing = standing
        self._view = view  # and its age in seconds
        self._fault = fault  # what has died or hangs, as a sentence; empty if nothing
        self._writing = asyncio.Lock()  # one scrape at a time
        self._scrape = scrape
        self._warnings = warnings  # of what was found wrong in etcd lately

    async def livez(self, request: web.Request) -> web.Response:
        """200 while the node works; what answers otherwise should be restarted."""
        fault = self._fault()
        return web.Response(text=f"{fault or 'ok'}\n", status=503 if fault else 200)

    async def readyz(self, request: web.Request) -> web.Response:
        """200 while this node should get traffic; 503 while it is drained, though it serves."""
        fault = self._fault()
        if fault or not self._standing.serving:
            return web.Response(text=f"{fault or self._standing.sentence}\n", status=503)
        if self._node in self._view()[0].draining:
            text = f"node {self._node} is drained; llumnixctl drain {self._node} --cancel ends that"
            return web.Response(text=text + "\n", status=503)
        return web.Response(text="ok\n")

    async def health(self, request: web.Request) -> web.Response:
        """vLLM's own health route: 200 with an empty body when requests can be answered."""
        well = self._standing.serving and not self._fault()
        return web.Response(status=200 if well else 503)

    async def status(self, request: web.Request) -> web.Response:
        """The cluster as this node sees it."""
        view, age = self._view()
        return json_response(describe(self._node, view, age) | {"warnings": self._warnings()})

    async def metrics(self, request: web.Request) -> web.Response:
        """vLLM's metrics and llumnix's, for Prometheus."""
        async with self._writing:
            text = await self._scrape()
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


def json_response(value: Any) -> web.Response:
    """An indented JSON answer, for people and jq alike."""
    body = orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    return web.Response(body=body, content_type="application/json")


def describe(node: NodeId, view: ClusterView, age: float) -> dict[str, Any]:
    """The view of the cluster as plain data."""
    return {
        "node": node,
        "version": __version__,
        "leader": view.leader,
        "leader_epoch": view.leader_epoch,
        "revision": view.revision,
        "view_age_seconds": round(age, 3) if age != float("inf") else None,
        "nodes": [asdict(n) for _, n in sorted(view.nodes.items())],
        "instances": [
            asdict(instance) | {"load": _load(view, name)}
            for name, instance in sorted(view.instances.items())
        ],
        "desired": dict(view.desired),
        "draining": sorted(view.draining),
    }


def _load(view: ClusterView, instance: str) -> dict[str, Any] | None:
    load = view.loads.get(instance)
    if load is None:
        return None
    fields = ("running", "waiting", "used_blocks", "waiting_blocks", "preemptions")
    return {name: getattr(load, name) for name in fields}
