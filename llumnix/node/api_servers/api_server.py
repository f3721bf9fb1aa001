"""One API server: what a request of its clients passes, from the socket to the exchange."""

import logging
from collections.abc import Callable, Sequence
from socket import socket

from llumnix.cluster import ClusterView
from llumnix.dataplane.client import ClusterClient
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.peer import PATH
from llumnix.dataplane.placer import Dispatcher
from llumnix.dataplane.waiting import WaitLimits
from llumnix.engine.base import EngineFacts
from llumnix.engine.vllm.frontend.media_budgets import MediaRoom
from llumnix.metrics import Counts
from llumnix.node.engines import resumes
from llumnix.node.frontend_start import Opening
from llumnix.node.options import NodeOptions
from llumnix.policy.priority_classes import Classes
from llumnix.server import engine_requests
from llumnix.server.admission import Admission, SharedCounts
from llumnix.server.app import AppParts, Gateway, make_app
from llumnix.server.body_checks.binary_fields import taken_by
from llumnix.server.body_checks.contents import Contents
from llumnix.server.body_checks.limits import body_limits
from llumnix.server.door.cors import allow_origins
from llumnix.server.door.guard import Guard
from llumnix.server.drain_routes import Drains
from llumnix.server.errors import Handler
from llumnix.server.generate_route import DemoRoute
from llumnix.server.operations import Operations
from llumnix.server.priority import Priorities
from llumnix.server.request_ids import give_request_id
from llumnix.server.request_routes import Moves
from llumnix.server.status_routes import Admin, Standing
from llumnix.server.transport.bodies import Bodies
from llumnix.server.transport.limits import connection_limits
from llumnix.server.transport.listener import Listener

logger = logging.getLogger(__name__)


class ApiServer:
    """vLLM's API over the cluster, for the clients of one process; lives on its loop."""

    def __init__(
        self,
        options: NodeOptions,
        classes: Classes,
        exchange: Exchange,
        dispatching: Dispatcher,
        view: Callable[[], ClusterView],
        facts: Callable[[], EngineFacts | None],
        door: Guard,
        on_try: Callable[[], None],
        on_open: Callable[[], None] = lambda: None,
        counts: SharedCounts | None = None,
    ) -> None:
        """`facts`: of an instance of this node, if one is up. `on_try`: called once, when the
        frontend has been opened, or could not be the first time; `on_open`: when it serves.
        `counts`: what the other API servers of the node have open."""
        config = options.config
        self._options = options
        self._dispatching = dispatching
        self._door = door
        self._counts = counts
        self._on_open = on_open
        self._begun = False  # once the node has started, and until it stops
        self._listener: Listener | None = None
        self.standing = Standing()
        self.priorities = Priorities(classes)
        self.admission = Admission(
            config.max_requests, config.max_prompt_tokens, options.root_path, counts
        )
        self.client = ClusterClient(
            exchange,
            dispatching,
            config.max_instances,
            limits=WaitLimits(config.failover_timeout, config.start_timeout),
            resumes=resumes(config, options.vllm),
            on_open=(self.priorities.enter, self.admission.enter, engine_requests.enter),
            on_close=(self.admission.leave,),
        )
        self.opening = Opening(options, self.client, facts, view, on_try, self._opened)
        self.gateway = Gateway(lambda: self.opening.frontend, self.standing, door.routes)

    async def listen(
        self,
        admin: Admin,
        operations: Operations,
        peer: Handler,
        sockets: Sequence[socket] = (),
    ) -> None:
        """Answer HTTP: on these sockets, or else on new ones as the options say. Raises OSError.

        `peer` answers the route of other nodes' links.
        """
        options, config = self._options, self._options.config
        model = options.vllm.model_config
        limits = body_limits(config.max_body_bytes, model.max_model_len, model.is_multimodal_model)
        parts = AppParts(
            gateway=self.gateway,
            admin=admin,
            moves=Moves(operations),
            drains=Drains(operations),
            admission=self.admission,
            contents=Contents(limits, taken_by(model), MediaRoom(config.media_budget)),
            priorities=self.priorities,
            generate=DemoRoute(
                lambda: self.opening.frontend, self.standing, self.gateway.answering
            ).handle,
            peer=(PATH, peer),
            origins=allow_origins(options.arguments),
            bodies=Bodies(config.body_timeout, config.body_budget),
            door=self._door,
        )
        app = make_app(parts)
        if options.arguments.enable_request_id_headers:
            app.on_response_prepare.append(give_request_id)
        shared = self._counts
        self._listener = Listener(
            *(app, options.arguments, connection_limits(config), config.admin_address),
            gives_way=shared.is_ahead if shared is not None else lambda: False,
        )
        await self._listener.open(sockets)
        self.look()

    def begin(self) -> None:
        """The node has started: serve as soon as an instance is ready."""
        self._begun = True
        self.look()

    def look(self) -> None:
        """The cluster may have changed: see whether requests can be served."""
        if not self._begun:
            return
        self.client.placer.instances_changed()
        self.opening.look()
        if self.opening.frontend is not None:
            self.standing.serving = bool(self._dispatching.ready())
            self.standing.awaiting = self._dispatching.awaited()
            self.standing.sentence = "no instance is ready"
        if self._counts is not None and self._listener is not None:
            self._counts.listens(self.standing.admits)

    def admit_no_more(self) -> None:
        """The node is stopping: take no new request, and finish those that are open."""
        self._begun = False
        self.standing.serving = self.standing.awaiting = False
        self.standing.sentence = "the node is stopping"

    async def refuse_new(self) -> None:
        """Close the listening sockets; open connections go on."""
        if self._listener is not None:
            await self._listener.refuse_new()

    async def close_connections(self) -> None:
        """Close the listening sockets and all connections."""
        if self._listener is not None:
            await self._listener.close()

    async def close(self) -> None:
        """End vLLM's frontend, and the client under it."""
        await self.opening.close()
        self.client.shutdown()

    @property
    def fault(self) -> str:
        """What of it has died for good; empty if nothing."""
        frontend = self.opening.frontend
        return "" if frontend is None or frontend.sound else "vLLM's frontend has died"

    @property
    def requests(self) -> int:
        """How many requests of its clients are open, or have ended with handlers still to end."""
        return max(len(self.client.ledger), self.gateway.running)

    @property
    def counts(self) -> Counts:
        """What it has open and has done, for the metrics."""
        ledger = self.client.ledger
        dropped = {str(reason): count for reason, count in ledger.dropped.items()}
        return Counts(len(ledger), dict(self.client.placer.dispatched), dropped)

    def _opened(self) -> None:
        """The frontend serves from now on."""
        self.look()
        self._on_open()
