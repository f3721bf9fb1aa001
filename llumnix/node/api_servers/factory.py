"""Makes the API servers of a node: one in its own process, or several in processes of theirs."""

import argparse
import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest

from llumnix.actors.dispatcher import Dispatching
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.peer import Peers
from llumnix.engine.vllm.processes.launcher import fork_server_address
from llumnix.engine.vllm.processes.socket_folder import scratch
from llumnix.node.actor_system import Acting
from llumnix.node.api_servers.api_process import Settings
from llumnix.node.api_servers.api_processes import ApiProcesses, Listeners, peer_app
from llumnix.node.api_servers.api_server import ApiServer
from llumnix.node.api_servers.base import OneApiServer
from llumnix.node.api_servers.host_calls import serve_host
from llumnix.node.api_servers.shared_counts import CountsFile
from llumnix.node.api_servers.sockets import Sockets
from llumnix.node.control_plane import ControlPlane
from llumnix.node.observation import Observation
from llumnix.node.operations import NodeOperations
from llumnix.node.options import NodeOptions, Policies
from llumnix.server.door.access import AccessRules
from llumnix.server.door.guard import Guard
from llumnix.server.status_routes import Admin
from llumnix.server.transport.limits import connection_limits
from llumnix.server.transport.listener import Listener


@dataclass(frozen=True)
class Behind:
    """The parts of a node on which its API servers stand."""

    options: NodeOptions
    policies: Policies
    control: ControlPlane
    acting: Acting
    exchange: Exchange
    peers: Peers
    observation: Observation
    door: Guard


def in_this_process(
    node: Behind, on_try: Callable[[], None], on_open: Callable[[], None]
) -> OneApiServer:
    """One API server, on the node's own loop; `on_try` and `on_open` as those of ApiServer."""
    control, acting = node.control, node.acting
    server = ApiServer(
        *(node.options, node.policies.terms.classes, node.exchange),
        dispatching=Dispatching(control.view, lambda: acting.dispatch),
        view=control.view,
        facts=node.observation.facts,
        door=node.door,
        on_try=on_try,
        on_open=on_open,
    )
    node.observation.server = server
    admin = Admin(
        node.options.config.node,
        server.standing,
        node.observation.view_and_age,
        node.observation.fault,
        control.alarms.now,
    )
    return OneApiServer(server, admin, NodeOperations(control, acting), node.peers.accept)


def in_processes(
    node: Behind,
    sockets: Sockets,
    registry: CollectorRegistry,
    admin_token: str,
    rules: AccessRules,
    on_try: Callable[[], None],
) -> ApiProcesses:
    """As many API servers as the options say, which listen on these sockets.

    `registry`: of the node's own metrics. `admin_token`: that the node has made; "" if none.
    """
    options, config = node.options, node.options.config
    counts = scratch() / "counts"

    def settings(index: int, life: str, first: bool) -> Settings:
        return Settings(
            *(index, options.api_servers, life, first and index == 0),
            node=config.node,
            address=sockets.peer_address,
            token=node.control.token,
            admin_token=admin_token,
            keys=rules.kept,
            config=config,
            arguments=options.arguments,
            vllm=options.vllm,
            sockets=sockets.public,
            counts=counts,
            fork_server=fork_server_address(),
            own_path=sockets.own_path,
        )

    limits = connection_limits(dataclasses.replace(config, max_connections=0))
    plain = argparse.Namespace(**{**vars(options.arguments), "ssl_certfile": None})
    listeners = Listeners(
        Listener(peer_app(node.peers.accept, node.door), options.arguments, limits),
        Listener(peer_app(node.peers.accept_own, node.door), plain, limits),
    )
    servers = ApiProcesses(
        options.api_servers,
        settings,
        CountsFile(counts, options.api_servers),
        node.exchange,
        listeners,
        sockets,
        node.observation.news,
        node.control.view,
        rules.look,
        on_try,
        node.acting.supervision.give_up,
    )
    serve_host(
        node.exchange,
        NodeOperations(node.control, node.acting),
        lambda: asyncio.to_thread(generate_latest, registry),
        servers.has_tried,
    )
    return servers
