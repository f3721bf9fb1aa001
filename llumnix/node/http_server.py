"""A node's HTTP server: which handler gets what, behind which guards, on which sockets."""

from llumnix.dataplane.peer import PATH
from llumnix.node.actor_system import Acting
from llumnix.node.control_plane import ControlPlane
from llumnix.node.observation import Observation
from llumnix.node.options import NodeOptions
from llumnix.node.request_path import RequestPath
from llumnix.server.app import AppParts, make_app
from llumnix.server.bodies import Bodies
from llumnix.server.body_checks import Contents
from llumnix.server.connection_limits import connection_limits
from llumnix.server.cors import allow_origins
from llumnix.server.drain_routes import Drains
from llumnix.server.generate_route import DemoRoute
from llumnix.server.guard import Guard
from llumnix.server.limits import body_limits
from llumnix.server.listener import Listener
from llumnix.server.request_ids import give_request_id
from llumnix.server.request_routes import Moves
from llumnix.server.status_routes import Admin, Standing


def make_listener(
    options: NodeOptions,
    door: Guard,
    path: RequestPath,
    acting: Acting,
    control: ControlPlane,
    observation: Observation,
    standing: Standing,
) -> Listener:
    """The server, not open yet."""
    config, model = options.config, options.vllm.model_config
    generate = DemoRoute(lambda: path.opening.frontend, standing, path.gateway.answering)
    parts = AppParts(
        gateway=path.gateway,
        admin=Admin(
            config.node,
            standing,
            observation.view_and_age,
            observation.fault,
            control.alarms.now,
        ),
        moves=Moves(lambda: acting.migrations),
        drains=Drains(lambda: control.registry, lambda: acting.migrations),
        admission=path.admission,
        contents=Contents(
            body_limits(config.max_body_bytes, model.max_model_len, model.is_multimodal_model)
        ),
        priorities=path.priorities,
        generate=generate.handle,
        peer=(PATH, path.peers.accept),
        origins=allow_origins(options.arguments),
        bodies=Bodies(config.body_timeout, config.body_budget),
        door=door,
    )
    app = make_app(parts)
    if options.arguments.enable_request_id_headers:
        app.on_response_prepare.append(give_request_id)
    return Listener(app, options.arguments, connection_limits(config), config.admin_address)
