"""One node: control plane, actors, engines, frontend and server.

Everything is started in order and stopped in reverse; this file only connects the rooms.
"""

import argparse
import asyncio
import contextlib
import logging
from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry
from vllm.config import VllmConfig

from llumnix import __version__
from llumnix.actors.instance_supervisor import NodeActor, Surroundings
from llumnix.cluster import ClusterView
from llumnix.config import Config
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.peer import Peers, ThisNode
from llumnix.engine.vllm.processes.socket_folder import scratch
from llumnix.metrics import NodeCollector
from llumnix.node.actor_system import Acting
from llumnix.node.api_servers.base import ApiServers
from llumnix.node.api_servers.factory import Behind, in_processes, in_this_process
from llumnix.node.api_servers.sockets import Sockets
from llumnix.node.control_plane import ControlPlane
from llumnix.node.engines import engine_maker
from llumnix.node.hosting import Hosting
from llumnix.node.observation import Observation
from llumnix.node.options import NodeOptions, read_policies
from llumnix.node.shutdown import Shutdown
from llumnix.secrecy import write_token
from llumnix.server.door.access import AccessRules
from llumnix.server.transport.listener import Listener

logger = logging.getLogger(__name__)


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
        several = self._options.api_servers > 1
        self._rules = AccessRules(config, arguments, keeps=several)
        self._control = ControlPlane(config)
        self._make_engine = engine_maker(config, vllm_config, self._control.rendezvous)
        self._servers: ApiServers | None = None
        self._bound: Sockets | None = None  # where API servers are processes
        self._registry = REGISTRY  # of the metrics of this process
        self._serving = False  # between a complete start and the beginning of the end
        self._ends = contextlib.AsyncExitStack()

    @property
    def requests(self) -> int:
        """How many requests this process has to do with now, roughly."""
        return self._api_servers().requests

    async def start(self) -> None:
        """Join the cluster and begin to serve. Raises EtcdError, OSError, with one sentence.

        What has been started is on the stack, for stop() to end in reverse.
        """
        self._loop = asyncio.get_running_loop()
        ends = self._ends
        self._acting = Acting(
            *(self._config, self._policies, self._loop, self._control, self._on_giving_up)
        )
        if self._options.api_servers > 1:
            self._bound = await Sockets.bind(self._config, self._options.arguments, scratch())
            ends.callback(self._bound.close)
            self._control.api_servers = self._options.api_servers
            self._control.peer_address = self._bound.peer_address
        ends.push_async_callback(asyncio.to_thread, self._control.close)
        await asyncio.to_thread(self._control.open, self._on_view, self._acting.sweep)
        made = await asyncio.to_thread(self._token) if self._rules.needs_token else ""
        self._connect(made)
        ends.push_async_callback(self._api_servers().close_connections)
        ends.push_async_callback(self._api_servers().close)
        await self._api_servers().listen()
        ends.push_async_callback(self._exchange.close)
        ends.callback(self._acting.stop)
        self._start_actors()
        ends.callback(self._acting.rescheduling.stop)
        ends.callback(self._hosting.stop)
        ends.push_async_callback(self._shutdown.halt)
        ends.push_async_callback(self._acting.migrations.close)
        collector = NodeCollector(self._observation.scraped)
        self._registry.register(collector)
        ends.callback(self._registry.unregister, collector)
        await asyncio.to_thread(self._control.join)
        self._serving = True
        self._api_servers().begin()
        self._on_view(self._control.view())
        desired = self._control.view().desired.get(
            self._config.node, self._config.initial_instances
        )
        self._acting.supervise.tell(NodeActor.want, desired)
        self._acting.lead()

    async def stop(self) -> None:
        """Let what runs end, within --drain-timeout; then leave, in reverse order of start."""
        try:
            if self._servers is not None:
                self._servers.admit_no_more()
            if self._serving:
                self._serving = False
                self._control.retire()  # another node's manager is to empty this one
                within = self._config.drain_timeout
                deadline = self._loop.time() + within
                await self._shutdown.reach(
                    self._control.view().nodes.keys() - {self._config.node}, within
                )
                await self._api_servers().refuse_new()
                await self._shutdown.drain(deadline)
        finally:
            await self._ends.aclose()

    # ---- the steps of a start ----

    def _token(self) -> str:
        """The cluster's own token for operators, left in a file for them."""
        token = self._control.admin_token()
        write_token(token, self._config.state_dir, self._config.cluster)
        return token

    def _connect(self, made_token: str) -> None:
        """Make the links to other nodes, and the API servers."""
        config, control = self._config, self._control
        address = control.peer_address or config.advertise_address
        ssl = Listener.client_ssl(self._options.arguments)
        me = ThisNode(config.node, address, __version__)
        self._peers = Peers(me, control.token, control.address_of, ssl)
        self._exchange = Exchange(config.node, self._peers)
        self._observation = Observation(
            *(config.node, self._policies.terms.classes, control, self._acting.supervision),
            exchange=self._exchange,
            peers=self._peers,
            servers=self._api_servers,
        )
        behind = Behind(
            *(self._options, self._policies, control, self._acting),
            exchange=self._exchange,
            peers=self._peers,
            observation=self._observation,
            door=self._rules.guard(made_token),
        )
        if self._bound is None:
            self._servers = in_this_process(behind, self._tried, self._opened)
        else:
            self._registry = CollectorRegistry()
            self._servers = in_processes(
                behind, self._bound, self._registry, made_token, self._rules, self._tried
            )
        self._shutdown = Shutdown(self._acting, self._exchange, self._servers)

    def _api_servers(self) -> ApiServers:
        assert self._servers is not None
        return self._servers

    def _tried(self) -> None:
        """A frontend serves, or could not be opened: instances that are up may be used."""
        self._acting.supervise.notify(NodeActor.announce_all)

    def _start_actors(self) -> None:
        self._hosting = hosting = Hosting(
            exchange=self._exchange,
            servers=self._api_servers(),
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
        self._acting.start(self._options.model, self._exchange, around)

    # ---- what it hears ----

    def _on_view(self, view: ClusterView) -> None:
        """A new view of the cluster; called on the registry's thread."""
        if self._acting.see(view):
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """See on the loop whether requests can be served."""
        if self._serving:
            self._api_servers().look()
            if self._config.migration:
                self._acting.migrations.look()

    def _opened(self) -> None:
        """The frontend serves from now on."""
        address = self._config.advertise_address
        logger.info("serving %s at http://%s", self._options.model, address)

    def _give_up(self, sentence: str) -> None:
        """The supervisor of the instances, on its thread, has no hope for this node."""
        self._loop.call_soon_threadsafe(self._acting.supervision.give_up, sentence)
