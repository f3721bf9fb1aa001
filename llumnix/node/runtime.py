"""One node, wired: control plane, actors, engines, frontend and server.

Everything is started in order and stopped in reverse; this file only connects the rooms.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import REGISTRY
from pykka import ActorDeadError
from vllm.config import VllmConfig

from llumnix.actors.supervision import Supervision
from llumnix.actors.supervisor import Surroundings
from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceState, NodeId
from llumnix.config import Config
from llumnix.dataplane.client import ClusterClient
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.peer import PATH, Peers, Self
from llumnix.dataplane.waiting import WaitLimits
from llumnix.metrics import NodeCollector, Snapshot
from llumnix.node.actor_system import Acting
from llumnix.node.control_plane import ControlPlane
from llumnix.node.dispatching import Dispatching
from llumnix.node.engines import engine_maker, resumes
from llumnix.node.frontend import Opening
from llumnix.node.load_reports import LoadReporter
from llumnix.node.policies import read_policies
from llumnix.operator_tokens import write_token
from llumnix.policy.scaling import mean_freeness
from llumnix.server import engine_requests
from llumnix.server.access import AccessRules
from llumnix.server.admission import Admission
from llumnix.server.app import Gateway, make_app
from llumnix.server.bodies import Bodies
from llumnix.server.body_checks import Contents
from llumnix.server.connection_limits import connection_limits
from llumnix.server.cors import allow_origins
from llumnix.server.drain_routes import Drains
from llumnix.server.generate_route import DemoRoute
from llumnix.server.guard import Guard
from llumnix.server.limits import body_limits
from llumnix.server.listener import Listener
from llumnix.server.priority import Priorities
from llumnix.server.request_ids import give_request_id
from llumnix.server.request_routes import Moves
from llumnix.server.status_routes import Admin, Standing
from llumnix.version import VERSION

logger = logging.getLogger(__name__)

SUCCESSOR_SECONDS = 1.0  # for which the successor of an actor that has died is waited for
LINK_SECONDS = 2.0  # in which a node that leaves connects to the others
SCRAPE_SECONDS = 10.0  # for which a scrape of the metrics waits for the loop
HALT_SECONDS = 30.0  # for all engines to end
POLL = 0.05  # seconds between looks while something ends


class Node:
    """A node of the cluster, from its start to its end, on one event loop."""

    def __init__(
        self, config: Config, arguments: argparse.Namespace, vllm_config: VllmConfig
    ) -> None:
        self._config = config
        self._arguments = arguments
        self._vllm_config = vllm_config
        self.standing = Standing()
        self._policies = read_policies(config)
        self._rules = AccessRules(config, arguments)
        self._control = ControlPlane(config)
        self._make_engine = engine_maker(config, vllm_config, self._control.rendezvous)
        self._collector = NodeCollector(self._scraped)
        self._serving = False  # between a complete start and the beginning of the end
        # Called with one sentence when this node cannot go on and has to be stopped.
        self.on_giving_up: Callable[[str], None] = lambda sentence: None
        self._ends = contextlib.AsyncExitStack()

    @property
    def view(self) -> ClusterView:
        """The cluster as this node sees it."""
        return self._control.registry.view

    @property
    def requests(self) -> int:
        """How many requests of its clients are open, or have ended with handlers still to end."""
        return max(len(self._client.ledger), self._gateway.running)

    async def start(self) -> None:
        """Join the cluster and begin to serve. Raises EtcdError, OSError, with one sentence.

        What has been started is on the stack, for stop() to end in reverse.
        """
        self._loop = asyncio.get_running_loop()
        self._supervision = Supervision(self._loop, lambda sentence: self.on_giving_up(sentence))
        self._acting = Acting(
            *(self._config, self._policies, self._loop), *(self._supervision, self._control)
        )
        ends = self._ends
        ends.push_async_callback(asyncio.to_thread, self._control.close)
        await asyncio.to_thread(self._control.open, self._on_view)
        made = await asyncio.to_thread(self._token) if self._rules.needs_token else ""
        self._connect(self._rules.guard(made))
        ends.push_async_callback(self._listener.close)
        await self._listener.open()
        ends.push_async_callback(self._exchange.close)
        ends.callback(self._acting.stop)
        self._start_actors()
        ends.callback(self._acting.rescheduling.stop)
        ends.push_async_callback(self._halt)
        ends.push_async_callback(self._acting.migrations.close)
        REGISTRY.register(self._collector)
        ends.callback(REGISTRY.unregister, self._collector)
        await asyncio.to_thread(self._control.join)
        self._serving = True
        self._on_view(self.view)
        desired = self.view.desired.get(self._config.node, self._config.initial_instances)
        self._acting.supervise.want.defer(desired)
        self._acting.lead()

    async def stop(self) -> None:
        """Let what runs end, within --drain-timeout; then leave, in reverse order of start."""
        self.standing.serving = self.standing.awaiting = False
        self.standing.sentence = "the node is stopping"
        try:
            if self._serving:
                self._serving = False
                self._control.retire()  # another node's manager is to empty this one
                deadline = self._loop.time() + self._config.drain_timeout
                if self._busy():  # any node may lead, and this one can't be dialled soon
                    others = self.view.nodes.keys() - {self._config.node}
                    within = min(LINK_SECONDS, self._config.drain_timeout)
                    await self._exchange.reach(others, within)
                await self._listener.refuse_new()
                await self._asked("leave")
                await self._drained(deadline)
        finally:
            await self._ends.aclose()

    def _token(self) -> str:
        """The cluster's own token for operators, left in a file for them."""
        token = self._control.admin_token()
        write_token(token, self._config.state_dir, self._config.cluster)
        return token

    def _connect(self, door: Guard) -> None:
        """Make the way of a request: server, frontend's client, exchange, peers."""
        config = self._config
        ssl = Listener.client_ssl(self._arguments)
        me = Self(config.node, config.advertise_address, VERSION)
        self._peers = Peers(me, self._control.token, self._address_of, ssl)
        self._exchange = Exchange(config.node, self._peers)
        self._dispatching = Dispatching(lambda: self.view, self._acting)
        root = self._arguments.root_path or ""
        admission = Admission(config.max_requests, config.max_prompt_tokens, root)
        priorities = Priorities(self._policies.terms.classes)
        self._client = ClusterClient(
            self._exchange,
            self._dispatching,
            config.max_instances,
            limits=WaitLimits(config.failover_timeout, config.start_timeout),
            resumes=resumes(config, self._vllm_config),
            on_open=(priorities.enter, admission.enter, engine_requests.enter),
            on_close=(admission.leave,),
        )
        self._reporter = LoadReporter(
            self._exchange.hosted.values, self._control.registry.report_loads
        )
        self._opening = Opening(
            *(self._arguments, self._vllm_config, self._client, self._exchange.hosted),
            *(lambda: self.view, self._dispatching.ready),
        )
        self._opening.on_try = lambda: self._acting.supervise.notify("announce_all")
        self._opening.on_open = self._opened
        self._gateway = Gateway(lambda: self._opening.frontend, self.standing, door.routes)
        warnings = self._control.alarms.now
        admin = Admin(config.node, self.standing, self._view_and_age, self._fault, warnings)
        moves = Moves(lambda: self._acting.migrations)
        drains = Drains(lambda: self._control.registry, lambda: self._acting.migrations)
        demo = DemoRoute(lambda: self._opening.frontend, self.standing, self._gateway.answering)
        peer = (PATH, self._peers.accept)
        model = self._vllm_config.model_config
        contents = Contents(
            body_limits(config.max_body_bytes, model.max_model_len, model.is_multimodal_model)
        )
        bodies = Bodies(config.body_timeout, config.body_budget)
        app = make_app(
            *(self._gateway, admin, moves, drains, admission, contents, priorities, demo.handle),
            *(peer, allow_origins(self._arguments), bodies, door),
        )
        if self._arguments.enable_request_id_headers:
            app.on_response_prepare.append(give_request_id)
        limits = connection_limits(config)
        self._listener = Listener(app, self._arguments, limits, config.admin_address)

    def _start_actors(self) -> None:
        around = Surroundings(
            loop=self._loop,
            make=self._host,
            requests=self._requests_of,
            announce=self._announce,
            withdraw=self._withdraw,
            tell=self._acting.tell_supervisor,
            give_up=self._give_up,
        )
        self._acting.start(self._model, self._exchange, around)

    @property
    def _model(self) -> str:
        names = self._arguments.served_model_name
        return str(names[0] if names else self._arguments.model)

    # ---- what the rooms ask of one another ----

    def _on_view(self, view: ClusterView) -> None:
        """A new view of the cluster; called on the registry's thread."""
        if self._acting.see(view):
            self._loop.call_soon_threadsafe(self._look, view)

    def _look(self, view: ClusterView) -> None:
        """See on the loop whether requests can be served."""
        if not self._serving:
            return
        self._client.placer.instances_changed()
        self._opening.look()
        if self._config.migration:
            self._acting.migrations.look()
        if self._opening.frontend is not None:
            self.standing.serving, self.standing.awaiting = (
                bool(self._dispatching.ready()),
                self._dispatching.awaited(),
            )
            self.standing.sentence = "no instance is ready"

    def _opened(self) -> None:
        """The frontend serves from now on."""
        self._look(self.view)
        logger.info("serving %s at http://%s", self._model, self._config.advertise_address)

    def _announce(self, info: InstanceInfo) -> None:
        """Make an instance known; called on the supervisor's thread.

        None of this node's is ready for others while the frontend has not been opened: that keeps
        the loop busy for seconds, in which no token would get through.
        """
        if info.state is InstanceState.READY and not self._opening.tried:
            info = dataclasses.replace(info, state=InstanceState.STARTING)
            self._loop.call_soon_threadsafe(self._look, self.view)
        self._control.registry.announce_instance(info)

    def _give_up(self, sentence: str) -> None:
        self._loop.call_soon_threadsafe(self._supervision.give_up, sentence)

    def _host(self, instance: InstanceId, slot: int) -> HostedInstance:
        hosted = HostedInstance(
            self._make_engine(instance, slot),
            slot,
            self._client,
            self._reporter.changed,
            by_priority=self._vllm_config.scheduler_config.policy == "priority",
        )
        self._exchange.hosted[instance] = hosted
        return hosted

    def _withdraw(self, instance: InstanceId) -> None:
        self._control.registry.withdraw_instance(instance)
        self._loop.call_soon_threadsafe(partial(self._exchange.hosted.pop, instance, None))

    def _requests_of(self, instance: InstanceId) -> int:
        hosted = self._exchange.hosted.get(instance)
        return hosted.requests if hosted else 0

    def _address_of(self, node: NodeId) -> str | None:
        info = self.view.nodes.get(node)
        return info.address if info else None

    def _fault(self) -> str:
        """What has died or hangs of the parts that nothing restarts; empty if nothing."""
        frontend = self._opening.frontend
        if frontend is not None and not frontend.sound:
            return "vLLM's frontend has died"
        return self._supervision.fault or self._control.standstill()

    def _view_and_age(self) -> tuple[ClusterView, float]:
        return self.view, self._control.registry.age

    def _scraped(self) -> Snapshot:
        """The facts for the metrics; called on the thread that writes them."""

        async def look() -> Snapshot:
            return self._snapshot()

        looking = asyncio.run_coroutine_threadsafe(look(), self._loop)
        return looking.result(SCRAPE_SECONDS)

    def _snapshot(self) -> Snapshot:
        classes = self._policies.terms.classes
        return Snapshot(
            node=self._config.node,
            view=self.view,
            view_age=self._control.registry.age,
            loads=tuple(h.load() for h in self._exchange.hosted.values() if h.facts),
            open_requests=len(self._client.ledger),
            dispatched=dict(self._client.placer.dispatched),
            dropped={str(k): v for k, v in self._client.ledger.dropped.items()},
            peers=self._peers.open,
            classes={p: made.name for p, made in classes.by_priority.items()},
            mean_freeness=mean_freeness(self.view, classes),
        )

    # ---- the end ----

    async def _asked(self, message: str) -> Any:
        """What the instances' supervisor answers; None if it has died for good."""
        deadline = self._loop.time() + SUCCESSOR_SECONDS
        while True:
            try:
                return await getattr(self._acting.supervise, message)()
            except ActorDeadError:  # of which there may be a successor at once
                if self._loop.time() >= deadline:
                    logger.error("the supervisor of the instances is dead: no %s", message)
                    return None
            await asyncio.sleep(POLL)

    async def _drained(self, deadline: float) -> None:
        """Wait until nothing runs here any more, neither for own clients nor for other nodes."""
        while self._busy():
            if self._loop.time() >= deadline:
                names = ", ".join(self._names()) or "none by name"
                logger.warning("the drain timeout ends %d requests: %s", self._busy(), names)
                return
            await asyncio.sleep(POLL)

    def _busy(self) -> int:
        hosted = sum(h.requests for h in self._exchange.hosted.values())
        return self._gateway.running + len(self._client.ledger) + hosted

    def _names(self) -> list[str]:
        """The requests of this node's clients, and those that its instances run for others."""
        here = {t.request_id for h in self._exchange.hosted.values() for t in h.tenants}
        return sorted(here | set(self._client.ledger))

    async def _halt(self) -> None:
        """Stop the engines, then what stood on them."""
        left = await self._asked("halt")
        deadline = self._loop.time() + HALT_SECONDS
        while left and self._loop.time() < deadline:
            await asyncio.sleep(POLL)
            left = await self._asked("left")
        if left is None:
            await asyncio.gather(*(h.stop(0.0) for h in [*self._exchange.hosted.values()]))
        await self._opening.close()
        self._client.shutdown()
        self._reporter.stop()
