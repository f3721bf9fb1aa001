"""The way of a node's requests: peers, exchange, client, frontend and server, each for the next."""

from collections.abc import Callable

from llumnix import __version__
from llumnix.actors.dispatcher import Dispatching
from llumnix.actors.supervisor import NodeActor
from llumnix.cluster import NodeId
from llumnix.dataplane.client import ClusterClient
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.peer import PATH, Peers, Self
from llumnix.dataplane.waiting import WaitLimits
from llumnix.node.actor_system import Acting
from llumnix.node.control_plane import ControlPlane
from llumnix.node.engines import resumes
from llumnix.node.frontend import Opening
from llumnix.node.options import NodeOptions
from llumnix.policy.classes import Classes
from llumnix.server import engine_requests
from llumnix.server.admission import Admission
from llumnix.server.app import AppParts, Gateway, make_app
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
from llumnix.server.routes import RouteTable
from llumnix.server.status_routes import Admin, Standing


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
        me = Self(config.node, config.advertise_address, __version__)
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
            options.arguments,
            options.vllm,
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
            contents=Contents(limits),
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
        hosted = sum(h.requests for h in self.exchange.hosted.values())
        return self.gateway.running + len(self.client.ledger) + hosted

    @property
    def names(self) -> list[str]:
        """The requests of this node's clients, and those that its instances run for others."""
        here = {t.request_id for h in self.exchange.hosted.values() for t in h.tenants}
        return sorted(here | set(self.client.ledger))

    def _address_of(self, node: NodeId) -> str | None:
        info = self._control.view().nodes.get(node)
        return info.address if info else None
