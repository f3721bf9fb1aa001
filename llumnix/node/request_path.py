"""The way of a node's requests: peers, exchange, client, frontend and server, each for the next."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from llumnix import __version__
from llumnix.actors.dispatcher import Dispatching
from llumnix.actors.supervisor import NodeActor
from llumnix.cluster import ClusterView, InstanceId, NodeId
from llumnix.dataplane.client import ClusterClient
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.peer import PATH, Peers, ThisNode
from llumnix.dataplane.waiting import WaitLimits
from llumnix.engine.base import EngineError, EngineFacts
from llumnix.engine.vllm.media_budgets import MediaRoom
from llumnix.node.actor_system import Acting
from llumnix.node.control_plane import ControlPlane
from llumnix.node.engines import resumes
from llumnix.node.options import NodeOptions
from llumnix.policy.priority_classes import Classes
from llumnix.server import engine_requests
from llumnix.server.admission import Admission
from llumnix.server.app import AppParts, Gateway, make_app
from llumnix.server.body_checks.binary_fields import taken_by
from llumnix.server.body_checks.contents import Contents
from llumnix.server.body_checks.limits import body_limits
from llumnix.server.door.cors import allow_origins
from llumnix.server.door.guard import Guard
from llumnix.server.door.routes import RouteTable
from llumnix.server.drain_routes import Drains
from llumnix.server.frontend import Frontend
from llumnix.server.generate_route import DemoRoute
from llumnix.server.priority import Priorities
from llumnix.server.request_ids import give_request_id
from llumnix.server.request_routes import Moves
from llumnix.server.status_routes import Admin, Standing
from llumnix.server.transport.bodies import Bodies
from llumnix.server.transport.limits import connection_limits
from llumnix.server.transport.listener import Listener

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # until the frontend is tried again


class RequestPath:
    """What a request of this node's clients passes; lives on the node's loop."""

    def __init__(
        self,
        options: NodeOptions,
        classes: Classes,
        control: ControlPlane,
        acting: Acting,
        standing: Standing,
        routes: RouteTable,
        on_open: Callable[[], None],
    ) -> None:
        """`on_open`: called when the frontend serves."""
        config = options.config
        self._options = options
        self._control = control
        self._acting = acting
        self._standing = standing
        self.dispatching = Dispatching(control.view, lambda: acting.dispatch)
        me = ThisNode(config.node, config.advertise_address, __version__)
        ssl = Listener.client_ssl(options.arguments)
        self.peers = Peers(me, control.token, self._address_of, ssl)
        self.exchange = Exchange(config.node, self.peers)
        self.priorities = Priorities(classes)
        self.admission = Admission(config.max_requests, config.max_prompt_tokens, options.root_path)
        self.client = ClusterClient(
            self.exchange,
            self.dispatching,
            config.max_instances,
            limits=WaitLimits(config.failover_timeout, config.start_timeout),
            resumes=resumes(config, options.vllm),
            on_open=(self.priorities.enter, self.admission.enter, engine_requests.enter),
            on_close=(self.admission.leave,),
        )
        self.opening = Opening(
            options,
            self.client,
            self.exchange.hosted,
            control.view,
            on_try=lambda: acting.supervise.notify(NodeActor.announce_all),
            on_open=on_open,
        )
        self.gateway = Gateway(lambda: self.opening.frontend, standing, routes)

    def listener(self, door: Guard, admin: Admin) -> Listener:
        """The HTTP server behind that door, not open yet."""
        options, config, model = (
            self._options,
            self._options.config,
            self._options.vllm.model_config,
        )
        limits = body_limits(config.max_body_bytes, model.max_model_len, model.is_multimodal_model)
        parts = AppParts(
            gateway=self.gateway,
            admin=admin,
            moves=Moves(lambda: self._acting.migrations),
            drains=Drains(lambda: self._control.registry, lambda: self._acting.migrations),
            admission=self.admission,
            contents=Contents(limits, taken_by(model), MediaRoom(config.media_budget)),
            priorities=self.priorities,
            generate=DemoRoute(
                lambda: self.opening.frontend, self._standing, self.gateway.answering
            ).handle,
            peer=(PATH, self.peers.accept),
            origins=allow_origins(options.arguments),
            bodies=Bodies(config.body_timeout, config.body_budget),
            door=door,
        )
        app = make_app(parts)
        if options.arguments.enable_request_id_headers:
            app.on_response_prepare.append(give_request_id)
        return Listener(app, options.arguments, connection_limits(config), config.admin_address)

    @property
    def requests(self) -> int:
        """How many requests of its clients are open, or have ended with handlers still to end."""
        return max(len(self.client.ledger), self.gateway.running)

    @property
    def busy(self) -> int:
        """How much still runs here, for own clients or for other nodes."""
        hosted = sum(len(h.requests) for h in self.exchange.hosted.values())
        return self.gateway.running + len(self.client.ledger) + hosted

    @property
    def names(self) -> list[str]:
        """The requests of this node's clients, and those that its instances run for others."""
        here = {r.request_id for h in self.exchange.hosted.values() for r in h.requests}
        return sorted(here | set(self.client.ledger))

    def _address_of(self, node: NodeId) -> str | None:
        info = self._control.view().nodes.get(node)
        return info.address if info else None


class Opening:
    """A node's frontend, from the first try to open it to its end; lives on the node's loop."""

    def __init__(
        self,
        options: NodeOptions,
        client: ClusterClient,
        hosted: Mapping[InstanceId, HostedInstance],
        view: Callable[[], ClusterView],
        on_try: Callable[[], None],
        on_open: Callable[[], None],
    ) -> None:
        """`hosted`: the instances of this node. `on_try`: called once, after the first try;
        `on_open`: when the frontend serves."""
        self._options = options
        self._client = client
        self._hosted = hosted
        self._view = view
        self._on_try = on_try
        self._on_open = on_open
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self.frontend: Frontend | None = None
        self.tried = False  # whether it is open, or could not be opened the first time

    def look(self) -> None:
        """Begin, unless that was done already or there is no instance to learn from."""
        known = any(hosted.facts for hosted in self._hosted.values())
        if (known or self._client.instances) and self._task is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._open(), name="frontend")

    async def close(self) -> None:
        """End the frontend, or the opening of it."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.frontend is not None:
            await self.frontend.close()

    async def _open(self) -> None:
        frontend = Frontend(self._options.arguments, self._options.vllm, self._client)
        try:
            await frontend.open(await self._facts())
        except Exception as error:  # vLLM's, whatever it is; tried again as long as the node runs
            expected = isinstance(error, (EngineError, TimeoutError))
            logger.error("vLLM's frontend could not be opened: %s", error, exc_info=not expected)
            await frontend.close()
            self._has_tried()
            self._task = None
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self.look)
            return
        self.frontend = frontend
        self._has_tried()
        self._on_open()

    def _has_tried(self) -> None:
        if not self.tried:
            self.tried = True
            self._on_try()

    async def _facts(self) -> EngineFacts:
        """Facts of an instance of this node if one is up, else of any other."""
        for hosted in self._hosted.values():
            if hosted.facts is not None:
                return hosted.facts
        infos = [self._view().instances[i] for i in self._client.instances]
        if not infos:
            raise EngineError("no instance is ready")
        tasks = await self._client.get_supported_tasks_async()
        length = self._options.vllm.model_config.max_model_len
        return EngineFacts(infos[0].total_blocks, infos[0].block_size, length, tasks)
