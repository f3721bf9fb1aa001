"""One node: control plane, actors, engines, frontend and server.

Everything is started in order and stopped in reverse; this file only connects the rooms.
"""

import argparse
import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from prometheus_client import REGISTRY
from pykka import ActorDeadError
from vllm.config import VllmConfig

from llumnix.actors.supervisor import NodeActor, Surroundings
from llumnix.cluster import ClusterView, NodeId
from llumnix.config import Config
from llumnix.metrics import NodeCollector
from llumnix.node.actor_system import Acting
from llumnix.node.control_plane import ControlPlane
from llumnix.node.engines import engine_maker
from llumnix.node.hosting import Hosting
from llumnix.node.observation import Observation
from llumnix.node.options import NodeOptions, read_policies
from llumnix.node.request_path import RequestPath
from llumnix.secrecy import write_token
from llumnix.server.door.access import AccessRules
from llumnix.server.door.guard import Guard
from llumnix.server.status_routes import Admin, Standing

logger = logging.getLogger(__name__)

SUCCESSOR_SECONDS = 1.0  # for which the successor of an actor that has died is waited for
LINK_SECONDS = 2.0  # in which a node that leaves connects to the others
HALT_SECONDS = 30.0  # for all engines to end
POLL = 0.05  # seconds between looks while something ends

R = TypeVar("R")


class Node:
    """A node of the cluster, from its start to its end, on one event loop."""

    def __init__(
        self,
        config: Config,
        arguments: argparse.Namespace,
        vllm_config: VllmConfig,
        on_giving_up: Callable[[str], None],
    ) -> None:
        """`on_giving_up`: called with one sentence when this node cannot go on and has to be
        stopped. Raises ConfigError."""
        self._config = config
        self._options = NodeOptions(config, arguments, vllm_config)
        self._on_giving_up = on_giving_up
        self._policies = read_policies(config)
        self._rules = AccessRules(config, arguments)
        self._control = ControlPlane(config)
        self._make_engine = engine_maker(config, vllm_config, self._control.rendezvous)
        self._standing = Standing()
        self._serving = False  # between a complete start and the beginning of the end
        self._ends = contextlib.AsyncExitStack()

    @property
    def requests(self) -> int:
        """How many requests of its clients are open, or have ended with handlers still to end."""
        return self._path.requests

    async def start(self) -> None:
        """Join the cluster and begin to serve. Raises EtcdError, OSError, with one sentence.

        What has been started is on the stack, for stop() to end in reverse.
        """
        self._loop = asyncio.get_running_loop()
        ends = self._ends
        self._acting = Acting(
            *(self._config, self._policies, self._loop, self._control, self._on_giving_up)
        )
        ends.push_async_callback(asyncio.to_thread, self._control.close)
        await asyncio.to_thread(self._control.open, self._on_view, self._acting.sweep)
        made = await asyncio.to_thread(self._token) if self._rules.needs_token else ""
        self._connect(self._rules.guard(made))
        ends.push_async_callback(self._listener.close)
        await self._listener.open()
        ends.push_async_callback(self._path.exchange.close)
        ends.callback(self._acting.stop)
        self._start_actors()
        ends.callback(self._acting.rescheduling.stop)
        ends.callback(self._hosting.stop)
        ends.push_async_callback(self._shutdown.halt)
        ends.push_async_callback(self._acting.migrations.close)
        collector = NodeCollector(self._observation.scraped)
        REGISTRY.register(collector)
        ends.callback(REGISTRY.unregister, collector)
        await asyncio.to_thread(self._control.join)
        self._serving = True
        self._on_view(self._control.view())
        desired = self._control.view().desired.get(
            self._config.node, self._config.initial_instances
        )
        self._acting.supervise.tell(NodeActor.want, desired)
        self._acting.lead()

    async def stop(self) -> None:
        """Let what runs end, within --drain-timeout; then leave, in reverse order of start."""
        self._standing.serving = self._standing.awaiting = False
        self._standing.sentence = "the node is stopping"
        try:
            if self._serving:
                self._serving = False
                self._control.retire()  # another node's manager is to empty this one
                within = self._config.drain_timeout
                deadline = self._loop.time() + within
                await self._shutdown.reach(
                    self._control.view().nodes.keys() - {self._config.node}, within
                )
                await self._listener.refuse_new()
                await self._shutdown.drain(deadline)
        finally:
            await self._ends.aclose()

    # ---- the steps of a start ----

    def _token(self) -> str:
        """The cluster's own token for operators, left in a file for them."""
        token = self._control.admin_token()
        write_token(token, self._config.state_dir, self._config.cluster)
        return token

    def _connect(self, door: Guard) -> None:
        """Make the way of a request, behind the door, and what is told of it."""
        classes = self._policies.terms.classes
        self._path = path = RequestPath(
            options=self._options,
            classes=classes,
            control=self._control,
            acting=self._acting,
            standing=self._standing,
            routes=door.routes,
            on_open=self._opened,
        )
        self._observation = Observation(
            self._config.node, classes, self._control, self._acting.supervision, path
        )
        admin = Admin(
            self._config.node,
            self._standing,
            self._observation.view_and_age,
            self._observation.fault,
            self._control.alarms.now,
        )
        self._listener = path.listener(door, admin)
        self._shutdown = Shutdown(self._acting, path)

    def _start_actors(self) -> None:
        self._hosting = hosting = Hosting(
            path=self._path,
            registry=self._control.registry,
            make_engine=self._make_engine,
            by_priority=self._options.by_priority,
            look=self._look,
        )
        around = Surroundings(
            loop=self._loop,
            make=hosting.make,
            requests=hosting.requests,
            announce=hosting.announce,
            withdraw=hosting.withdraw,
            tell=self._acting.tell_supervisor,
            give_up=self._give_up,
        )
        self._acting.start(self._options.model, self._path.exchange, around)

    # ---- what it hears ----

    def _on_view(self, view: ClusterView) -> None:
        """A new view of the cluster; called on the registry's thread."""
        if self._acting.see(view):
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """See on the loop whether requests can be served."""
        if not self._serving:
            return
        path, standing = self._path, self._standing
        path.client.placer.instances_changed()
        path.opening.look()
        if self._config.migration:
            self._acting.migrations.look()
        if path.opening.frontend is not None:
            standing.serving = bool(path.dispatching.ready())
            standing.awaiting = path.dispatching.awaited()
            standing.sentence = "no instance is ready"

    def _opened(self) -> None:
        """The frontend serves from now on."""
        self._look()
        address = self._config.advertise_address
        logger.info("serving %s at http://%s", self._options.model, address)

    def _give_up(self, sentence: str) -> None:
        """The supervisor of the instances, on its thread, has no hope for this node."""
        self._loop.call_soon_threadsafe(self._acting.supervision.give_up, sentence)


class Shutdown:
    """Drains a node before it stops; lives on its loop."""

    def __init__(self, acting: Acting, path: RequestPath) -> None:
        self._acting = acting
        self._path = path

    async def reach(self, others: Iterable[NodeId], within: float) -> None:
        """Have links to the nodes that may take what runs here, if anything does.

        Any of them may lead, and this node can't be dialled soon.
        """
        if self._path.busy:
            await self._path.exchange.reach(others, min(LINK_SECONDS, within))

    async def drain(self, deadline: float) -> None:
        """Wait until nothing runs here any more, until the deadline on the loop's clock."""
        await self._asked(NodeActor.drain_all)
        while self._path.busy:
            if asyncio.get_running_loop().time() >= deadline:
                names = ", ".join(self._path.names) or "none by name"
                logger.warning("the drain timeout ends %d requests: %s", self._path.busy, names)
                return
            await asyncio.sleep(POLL)

    async def halt(self) -> None:
        """Stop the engines, then what stood on them."""
        loop = asyncio.get_running_loop()
        left = await self._asked(NodeActor.halt)
        deadline = loop.time() + HALT_SECONDS
        while left and loop.time() < deadline:
            await asyncio.sleep(POLL)
            left = await self._asked(NodeActor.left)
        if left is None:
            hosted = list(self._path.exchange.hosted.values())
            await asyncio.gather(*(instance.stop(0.0) for instance in hosted))
        await self._path.opening.close()
        self._path.client.shutdown()

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
