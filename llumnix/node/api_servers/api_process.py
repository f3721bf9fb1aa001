"""An API server in a process of its own: to all nodes like a node that hosts no instances.

It is linked to the node that it belongs to, which tells it of the cluster, and to each node at
whose instances its requests run. It has no keys in etcd, and no lease.
"""

import argparse
import asyncio
import dataclasses
import gc
import logging
import os
import random
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.plugins import load_general_plugins

from llumnix import __version__, log_lines
from llumnix.actors.actor_supervision import Supervision
from llumnix.actors.dispatcher import DispatcherActor, Dispatching
from llumnix.cluster import ClusterView, InstanceId, NodeId, server_name
from llumnix.config import Config, ConfigError
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.frames import NodeNews
from llumnix.dataplane.peer import Peers, ThisNode
from llumnix.engine.base import EngineError
from llumnix.engine.vllm.arguments import load_parsers
from llumnix.engine.vllm.processes.launcher import join_fork_server
from llumnix.engine.vllm.processes.parent_death import end_with_node
from llumnix.node.api_servers.api_server import ApiServer
from llumnix.node.api_servers.follower import Follower
from llumnix.node.api_servers.host_calls import OPEN, HostCalls, scrape_shared
from llumnix.node.api_servers.process_metrics import ProcessMetrics
from llumnix.node.api_servers.shared_counts import CountsFile
from llumnix.node.garbage_collection import Garbage
from llumnix.node.options import NodeOptions, read_policies
from llumnix.server.door.access import AccessRules
from llumnix.server.errors import elsewhere
from llumnix.server.operations import OperationError
from llumnix.server.status_routes import Admin
from llumnix.server.transport.listener import Listener
from llumnix.tasks import TaskSet

logger = logging.getLogger(__name__)

LARGEST = 26 * 2**20  # bytes of a body that each server can hold, whatever its share
AGAIN = 0.1  # seconds between two tries to reach the node, about
SAID = 50  # tries in vain after which it is said
LOOK = 0.2  # seconds between two looks whether the link to it is there


@dataclass(frozen=True)
class Settings:
    """What an API server is started with."""

    index: int  # 0, 1, … of those of its node
    of: int  # how many there are
    life: str  # by which the node knows its process
    at_once: bool  # whether it listens before it can serve, to answer probes
    node: NodeId
    address: str  # where other nodes dial the node
    own_path: str  # the socket file by which its API servers do
    token: str  # of the peer channel
    admin_token: str  # that the node has made; empty if it has made none
    keys: str | None  # what --api-key-file said when the node could use it last
    config: Config
    arguments: argparse.Namespace
    vllm: VllmConfig
    sockets: list[socket.socket]  # to listen on
    counts: Path  # the file of all servers' counts
    fork_server: Any  # the node's, for processes that this one needs

    @property
    def name(self) -> NodeId:
        """The name by which nodes know it, which no node can have."""
        return server_name(self.node, self.index)

    @property
    def shared(self) -> Config:
        """The configuration with this server's share of what is for a whole node."""

        config = self.config
        largest = max(config.max_body_bytes, LARGEST)

        def share(whole: int, least: int = 0) -> int:
            part = -(-whole // self.of)  # 0 is no limit, and stays that
            return max(part, min(whole, least))

        return dataclasses.replace(
            config,
            max_connections=share(config.max_connections),
            body_budget=share(config.body_budget, least=2 * largest),
            media_budget=share(config.media_budget),
        )


def serve(settings: Settings) -> None:
    """The main function of the process."""
    import uvloop

    gc.freeze()  # what the fork server has imported is never garbage: collections leave it out
    os.setpgid(0, 0)  # a Ctrl-C at the terminal is the node's business
    end_with_node()
    os.umask(0o077)
    sys.setswitchinterval(0.001)  # actors' threads run beside a busy event loop
    log_lines.to_stderr(f"api server {settings.index}: ")
    join_fork_server(settings.fork_server)
    load_general_plugins()
    load_parsers(settings.arguments)
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    process = ApiProcess(settings, ended)
    await process.start()
    try:
        await ended.wait()
    finally:
        await process.stop()


class ApiProcess:
    """The parts of an API server's process, on its loop."""

    def __init__(self, settings: Settings, ended: asyncio.Event) -> None:
        """`ended`: set when the process cannot go on."""
        config, node = settings.shared, settings.node
        self._settings = settings
        self._ended = ended
        self._tasks = TaskSet()
        options = NodeOptions(config, settings.arguments, settings.vllm)
        policies = read_policies(config)
        door = AccessRules(config, settings.arguments, settings.keys).guard(settings.admin_token)
        self._follower = follower = Follower(node, settings.address)
        me = ThisNode(settings.name, "", __version__, settings.life)
        ssl = Listener.client_ssl(settings.arguments)
        own = node, settings.own_path
        self._peers = Peers(me, settings.token, follower.address_of, ssl, own)
        self._exchange = Exchange(settings.name, self._peers, host=node)
        self._exchange.on_news = self._heard
        self._exchange.own_procedures[OPEN] = self._open
        self._supervision = Supervision(asyncio.get_running_loop(), self._give_up)
        self._dispatch = self._supervision.keep(
            lambda: DispatcherActor.start(
                node=settings.name,
                policy=policies.dispatch,
                top_k=config.dispatch_top_k,
                terms=policies.terms,
            ),
            lambda actor: actor.tell(DispatcherActor.update_view, follower.view()),
        )
        follower.on_view = self._see
        self._host = HostCalls(self._exchange, node, follower.view)
        self._server = ApiServer(
            options,
            policies.terms.classes,
            self._exchange,
            Dispatching(follower.view, lambda: self._dispatch),
            follower.view,
            follower.facts,
            door,
            on_try=self._tried,
            on_open=lambda: logger.info("serving %s", options.model),
            counts=CountsFile(settings.counts, settings.of).of(settings.index),
        )
        self._stopping = self._listens = False
        self._metrics = ProcessMetrics()

    async def start(self) -> None:
        """Listen, and follow the node from now on. Raises OSError."""
        admin = Admin(
            self._settings.node,
            self._server.standing,
            self._follower.view_and_age,
            self._fault,
            self._follower.warnings,
            lambda: scrape_shared(self._host),
        )
        self._parts = admin, self._host, elsewhere, self._settings.sockets
        if self._settings.at_once:
            await self._listen()
        self._server.begin()
        self._tasks.spawn(self._follow(), name="follower")
        self._tasks.spawn(self._metrics.publish(lambda: self._server.counts), name="metrics")
        self._tasks.spawn(Garbage(lambda: self._server.requests).watch(), name="garbage")

    async def stop(self) -> None:
        """End everything; the node has let requests end before, if it could."""
        await self._server.close_connections()
        await self._server.close()
        await self._tasks.close()
        await self._exchange.close()
        await asyncio.to_thread(self._supervision.stop)

    async def _follow(self) -> None:
        """Be linked to the node as long as this process lives."""
        tries = 0
        while True:
            try:
                link = await self._peers.link(self._settings.node)
            except EngineError as error:
                tries += 1
                if tries % SAID == 0:
                    logger.warning("the node does not answer its API server: %s", error)
                await asyncio.sleep(AGAIN * (1 + random.random()))
                continue
            tries = 0
            if self._server.opening.tried:  # which may not have got through before
                self._tasks.spawn(self._tell_tried())
            while not (link.closed or self._follower.astray):
                if self._server.fault:
                    self._give_up(self._server.fault)
                await asyncio.sleep(LOOK)
            await link.close()
            self._follower.astray = False

    def _heard(self, news: NodeNews) -> None:
        self._follower.heard(news)
        if news.stopping and not self._stopping:
            self._stopping = True
            self._server.admit_no_more()
            self._tasks.spawn(self._refuse_new())
        self._server.look()

    async def _open(self, instance: InstanceId) -> list[Any]:
        """What clients have open here: a number of handlers, and the ids of requests."""
        return [self._server.gateway.running, list(self._server.client.ledger)]

    def _see(self, view: ClusterView) -> None:
        self._dispatch.notify(DispatcherActor.update_view, view)

    def _fault(self) -> str:
        return self._server.fault or self._supervision.fault or self._follower.fault()

    async def _listen(self) -> None:
        """Take connections from now on; others of the node may have done so all the time."""
        if self._listens or self._stopping:
            return
        self._listens = True
        try:
            await self._server.listen(*self._parts)
        except (OSError, ConfigError) as error:
            self._give_up(f"it can't listen: {error}")

    async def _refuse_new(self) -> None:
        """Take no connection any more, and leave none waiting for one that never accepts."""
        await self._server.refuse_new()
        for bound in self._settings.sockets:
            bound.close()

    def _tried(self) -> None:
        self._tasks.spawn(self._listen())
        self._tasks.spawn(self._tell_tried())

    async def _tell_tried(self) -> None:
        try:
            await self._host.tried()
        except OperationError as error:  # a new link, or the next server, says it again
            logger.warning("%s", error)

    def _give_up(self, sentence: str) -> None:
        logger.critical("%s", sentence)
        self._ended.set()
