"""Live migrations on a mesh: real links and real records in etcd, to be stopped at any step."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from llumnix.actors.base import Handle
from llumnix.cluster import ClusterView, InstanceInfo, InstanceState, NodeInfo
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.session import Session
from llumnix.control.keys import Keys
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.placer import NoInstance, Route
from llumnix.engine.base import EngineError
from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.instance import SimEngine
from llumnix.migration.actor import MigrationActor
from llumnix.migration.departures import Rules
from llumnix.migration.messages import Move
from llumnix.migration.record import Handshake
from llumnix.migration.service import Migrations
from llumnix.migration.source import MigrationLimits
from llumnix.policy.decision_context import Terms
from tests.kit.loop import soon
from tests.kit.mesh import SMALL, MeshNode, Stream, mesh
from tests.kit.pace import Pace
from tests.kit.requests import answer

PROMPT, TOKENS = list(range(100, 140)), 120  # two blocks and a half of prompt
BEFORE = 5  # tokens that the request has generated when it begins to move

# In the order in which a migration takes them; those at the destination are marked so.
STEPS = ("propose", "offer", "accept", "copy", "stage 1", "reserve", "receive", "stage 2")
STEPS += ("commit", "hand over", "resume")
THERE = frozenset({"accept", "reserve", "receive", "resume"})


def before(step: str) -> tuple[str, ...]:
    """The steps that come before this one."""
    return STEPS[: STEPS.index(step)]


@dataclass(frozen=True)
class Layout:
    """On which nodes the request's source, its destination and its API server are."""

    source: str
    destination: str
    home: str


LAYOUTS = {
    "all on one node": Layout("a", "a", "a"),
    "API server at the source": Layout("a", "b", "a"),
    "API server at the destination": Layout("a", "b", "b"),
    "API server elsewhere": Layout("a", "b", "c"),
    "both elsewhere": Layout("a", "a", "c"),
}
# Enough where it matters little who is where.
NEAR_AND_FAR = ("all on one node", "API server elsewhere")
TYPICAL = (*NEAR_AND_FAR, "API server at the destination")
APART = {name: layout for name, layout in LAYOUTS.items() if layout.source != layout.destination}


@dataclass(frozen=True)
class Control:
    """One node's way to etcd."""

    etcd: Etcd
    session: Session


class Stop:
    """The first migration that comes to a step stops there until it is let go on."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.reached = asyncio.Event()
        self._goes_on = asyncio.Event()

    async def wait(self) -> None:
        self.reached.set()
        await self._goes_on.wait()

    def release(self) -> None:
        self._goes_on.set()


class Site:
    """A node of the mesh, with its side of all migrations."""

    def __init__(self, node: MeshNode, handshake: Handshake, cluster: "Cluster") -> None:
        self.node = node
        self.handshake = handshake
        limits = cluster.requests_limit, cluster.blocks_limit
        self.actor = Handle(MigrationActor.start(handshake, *limits))
        rules = Rules(cluster.limits, "low", Terms())
        self.migrations = Migrations(node.exchange, self.actor, lambda: cluster.view, rules)
        self.migrations.at = cluster.at


class Cluster:
    """All sites, their instances, and the requests that move between these."""

    def __init__(
        self,
        controls: dict[str, Control],
        keys: Keys,
        limits: MigrationLimits,
        requests_limit: int,
        blocks_limit: int,
    ) -> None:
        self.controls = controls
        self.keys = keys
        self.limits = limits
        self.requests_limit = requests_limit
        self.blocks_limit = blocks_limit
        self.sites: dict[str, Site] = {}
        self.paces: dict[str, Pace] = {}
        self.order: list[str] = []  # in which instances are tried for a request
        self.cut: set[frozenset[str]] = set()  # pairs of nodes that can't reach each other
        self.lost: Counter[tuple[str, str]] = Counter()  # by whom a connection to whom
        self.stops: list[Stop] = []
        self.leader_epoch = 0
        self.emptied: set[str] = set()  # instances that are to be stopped
        self.answers: dict[str, list[int]] = {}  # the right ones

    # ---- what is there ----

    @property
    def view(self) -> ClusterView:
        """The cluster as every node sees it: what has died is still in it."""
        hosted = {i: self.hosted(i) for i in self.order}
        return ClusterView(
            nodes={name: NodeInfo(name, "", "test", 1) for name in self.sites},
            instances={
                i: InstanceInfo(i, self.node_of(i).name, "m", self._state(i), f.total_blocks, 16)
                for i, h in hosted.items()
                if (f := h.facts)
            },
            loads={i: h.load() for i, h in hosted.items()},
            leader="a",
            leader_epoch=self.leader_epoch,
        )

    def _state(self, instance: str) -> InstanceState:
        return InstanceState.DRAINING if instance in self.emptied else InstanceState.READY

    def node_of(self, instance: str) -> MeshNode:
        return self.sites[instance.partition("-")[0]].node

    def hosted(self, instance: str) -> HostedInstance:
        return self.node_of(instance).hosted[instance]

    def engine(self, instance: str) -> SimEngine:
        return self.node_of(instance).engine(instance)

    def where(self, request: str) -> list[str]:
        """The instances that have the request and are alive."""
        return [i for i in self.order if self.alive(i) and self.hosted(i).find(request)]

    def alive(self, instance: str) -> bool:
        return self.hosted(instance).gone is None

    # ---- what tests do ----

    async def host(
        self, node: str, config: ModelConfig = SMALL, engine: type[SimEngine] = SimEngine
    ) -> str:
        """Start an instance, the next one that requests are given to."""
        pace, there = Pace(), self.sites[node].node
        made = engine(f"{node}-{len(there.hosted)}", config, pace.clock())
        instance = await there.host(engine=made)
        pace.follow(there.hosted[instance])
        self.paces[instance] = pace
        self.order.append(instance)
        return instance

    async def ask(self, home: str, name: str, tokens: int = TOKENS, **kwargs: Any) -> Stream:
        """Send a request in at a node."""
        prompt = kwargs.pop("prompt", PROMPT)
        self.answers[name] = answer(prompt, tokens)
        return await self.sites[home].node.ask(name, prompt, tokens, **kwargs)

    def move(self, name: str, source: str, destination: str, asks: str = "") -> "asyncio.Task[str]":
        """Begin to move a request, as that node asks; `moved`, or why it was not."""
        node = self.node_of(source).name
        return asyncio.create_task(self._moved(asks or node, node, source, destination, name))

    async def _moved(self, asks: str, node: str, source: str, destination: str, name: str) -> str:
        try:
            migrations = self.sites[asks].migrations
            moved = await migrations.command(node, source, Move(destination, "operator", name))
        except EngineError as error:
            return str(error)
        return moved.outcome

    async def at(self, step: str) -> None:
        for stop in self.stops:
            if stop.step == step and not stop.reached.is_set():
                await stop.wait()
                break

    def stop(self, step: str) -> Stop:
        """Stop the next migration that comes to this step."""
        self.stops.append(Stop(step))
        return self.stops[-1]

    async def lose_link(self, one: str, other: str) -> None:
        """End the connections between two nodes, which may make new ones; both have seen it."""
        links = [k for k in self.sites[one].node.peers._running if k.node == other]
        was = Counter(self.lost)
        for link in links:
            await link.close()
        if links:
            both = ((one, other), (other, one))
            await soon(lambda: all(self.lost[pair] > was[pair] for pair in both))

    async def sever(self, one: str, other: str) -> None:
        """End the connections between two nodes for good."""
        self.cut.add(frozenset((one, other)))
        await self.lose_link(one, other)

    def losing(self, node: str) -> Callable[[str, str], None]:
        return lambda other, reason: self.lost.update([(node, other)])

    def open(self) -> None:
        """Let all engines run."""
        for pace in self.paces.values():
            pace.open()

    def close(self) -> None:
        """Let engines run only as far as they are let."""
        for pace in self.paces.values():
            pace.close()

    def address_of(self, node: str, addresses: dict[str, str]) -> Callable[[str], str | None]:
        return lambda other: None if frozenset((node, other)) in self.cut else addresses.get(other)

    def dispatch_of(self, node: MeshNode) -> Callable[..., Awaitable[Route]]:
        async def dispatch(tokens: int, priority: int, avoid: frozenset[str]) -> Route:
            near = [i for i in self.order if self.alive(i) and self._reaches(node.name, i)]
            found = next((i for i in near if i not in avoid), None)
            if found is None:
                raise NoInstance("no instance is ready")
            return node.route(found)

        return dispatch

    def _reaches(self, node: str, instance: str) -> bool:
        return frozenset((node, self.node_of(instance).name)) not in self.cut


@asynccontextmanager
async def cluster(
    controls: dict[str, Control],
    keys: Keys,
    limits: MigrationLimits | None = None,
    requests_limit: int = 4,
    blocks_limit: int = 0,
    handshake: type[Handshake] = Handshake,
) -> AsyncIterator[Cluster]:
    """A node for each control; at the end of the test nothing may be left of its requests."""
    limits = limits or MigrationLimits(within=5.0)
    whole = Cluster(controls, keys, limits, requests_limit, blocks_limit)
    async with mesh(*controls) as nodes:
        try:
            for node in nodes:
                control = controls[node.name]
                record = handshake(control.etcd, control.session, keys)
                whole.sites[node.name] = Site(node, record, whole)
                node.dispatch = whole.dispatch_of(node)
                node.exchange.on_node_lost.append(whole.losing(node.name))
                addresses = node._mesh.addresses
                node.peers._address_of = whole.address_of(node.name, addresses)
            yield whole
        finally:
            for stop in whole.stops:
                stop.release()
            whole.open()
            for site in whole.sites.values():
                await site.migrations.close()
                site.actor.stop(5.0)
