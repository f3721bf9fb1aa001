"""A node's API servers in processes of their own: started, told of the cluster, started again."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.cluster import ClusterView
from llumnix.control.view_change import change
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.frames import News, NodeNews
from llumnix.dataplane.hosted_request import Origin
from llumnix.dataplane.peer import PATH
from llumnix.dataplane.peer_link import Link
from llumnix.engine.base import EngineError
from llumnix.node.api_servers.api_process import Settings
from llumnix.node.api_servers.base import Open
from llumnix.node.api_servers.host_calls import OPEN
from llumnix.node.api_servers.process_metrics import forget_process
from llumnix.node.api_servers.server_process import ServerProcess
from llumnix.node.api_servers.shared_counts import CountsFile
from llumnix.node.api_servers.sockets import Sockets
from llumnix.server.door.guard import Guard
from llumnix.server.errors import Handler, openai_errors
from llumnix.server.transport.listener import Listener
from llumnix.tasks import TaskSet

logger = logging.getLogger(__name__)

TOGETHER = 0.01  # seconds in which changes of the view become one
EVERY = 1.0  # seconds between two news where nothing changes
OPEN_SECONDS = 1.0  # for a server to say what it has open
END_SECONDS = 5.0  # for a server to end when it is told to
POLL = 0.05
HOPELESS = 5  # ends of each server, when none has ever opened its frontend


@dataclass
class Listeners:
    """What answers other nodes, and this node's own API servers, by a socket file."""

    of_nodes: Listener
    of_servers: Listener

    async def open(self, sockets: Sockets) -> None:
        """Begin to answer."""
        await self.of_nodes.open([sockets.peer])
        await self.of_servers.open([sockets.own])

    async def close(self) -> None:
        """Close everything."""
        await self.of_servers.close()
        await self.of_nodes.close()


class ApiProcesses:
    """Several API servers of a node; lives on the node's loop.

    Each is to the node like another node that it has requests of: what it asks for ends when its
    link does.
    """

    def __init__(
        self,
        count: int,
        settings: Callable[[int, str, bool], Settings],
        counts: CountsFile,
        exchange: Exchange,
        listeners: Listeners,
        sockets: Sockets,
        news: Callable[[], NodeNews],
        view: Callable[[], ClusterView],
        look: Callable[[], None],
        on_try: Callable[[], None],
        give_up: Callable[[str], None],
    ) -> None:
        """`settings`: see ServerProcess. `listeners` answer nodes, and the servers. `news`: what
        the servers are told, but for the change of the `view`. `look`: called now and then, to see
        what those that are started later are to know. `on_try`: called once, when one of them has
        opened its frontend, or could not; `give_up`: with a sentence, when none comes up.
        """
        self._counts = counts
        self._exchange = exchange
        self._listeners = listeners
        self._sockets = sockets
        self._news = news
        self._view = view
        self._look = look
        self._on_try = on_try
        self._give_up = give_up
        self._servers = [ServerProcess(n, settings, self._ended) for n in range(count)]
        self._tasks = TaskSet()
        self._keeping = TaskSet()
        self._pending: asyncio.TimerHandle | None = None
        self._stopping = False
        self.tried = False
        exchange.bind(self)

    # ---- their life ----

    async def listen(self) -> None:
        """Start them all, and answer the links of nodes and of theirs. Raises OSError."""
        await self._listeners.open(self._sockets)
        for server in self._servers:
            self._keeping.spawn(server.keep(), name=f"api-server-{server.index}")
        self._tasks.spawn(self._tell_often(), name="news")

    def _ended(self, server: ServerProcess, pid: int) -> None:
        self._counts.clear(server.index)
        self._tasks.spawn(asyncio.to_thread(forget_process, pid), name="metrics")
        if not self.tried and all(each.ended >= HOPELESS for each in self._servers):
            self._give_up("no API server comes up")

    # ---- as the node sees them ----

    def home(self) -> Origin | None:
        """The first that is linked: it gets the engines' statistics."""
        return next((s.link for s in self._servers if s.linked), None)

    def begin(self) -> None:
        """The node has started."""
        self.look()

    def look(self) -> None:
        """The cluster may have changed: tell them, soon."""
        if self._pending is None and not self._stopping:
            loop = asyncio.get_running_loop()
            self._pending = loop.call_later(TOGETHER, self._tell)

    def has_tried(self) -> None:
        """One of them has opened its frontend, or could not."""
        if not self.tried:
            self.tried = True
            self._on_try()

    def admit_no_more(self) -> None:
        """Have them take no new request, nor listen."""
        self._stopping = True
        self._tell()

    async def refuse_new(self) -> None:
        """Give up the addresses, on which they listen no more; one that dies now stays so."""
        for server in self._servers:
            server.end()
        for bound in self._sockets.public:
            bound.close()

    async def close_connections(self) -> None:
        """Close the links of other nodes; clients' connections have ended with the servers."""
        self._sockets.close()
        await self._listeners.close()

    async def close(self) -> None:
        """End the servers, one that is just being started among them."""
        self._tasks.cancel()
        if self._pending is not None:
            self._pending.cancel()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + END_SECONDS
        for server in self._servers:
            server.end()
            server.terminate()
        while len(self._keeping) and loop.time() < deadline:
            await asyncio.sleep(POLL)
            for server in self._servers:
                server.terminate()
        for server in self._servers:
            server.kill()
        await self._tasks.close()
        await self._keeping.close()

    async def open(self) -> Open:
        """What clients have open at all of them; one that does not answer counts as it did last."""
        said = await asyncio.gather(*map(self._open_at, self._servers))
        return Open(sum(one.running for one in said), [i for one in said for i in one.requests])

    async def _open_at(self, server: ServerProcess) -> Open:
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                if server.link is not None:
                    return Open(*await server.link.call("", OPEN, ()))
        except (EngineError, TimeoutError):
            pass
        return Open(self._counts.row(server.index)[0])

    @property
    def requests(self) -> int:
        """How many requests this process has to do with now."""
        return sum(len(hosted.requests) for hosted in self._exchange.hosted.values())

    @property
    def fault(self) -> str:
        """Nothing of them dies for good."""
        return ""

    # ---- as the exchange sees them: what comes for an API server of this very process ----

    @property
    def node(self) -> str:
        """The node."""
        return self._exchange.node

    def deliver(self, frame: News, stats: SchedulerStats | None = None) -> None:
        """Nothing is asked for here, so nothing comes."""

    def node_found(self, link: Link) -> None:
        """There is a new link: if it is of one of them, tell it all."""
        for server in self._servers:
            if link.own and server.take(link, self.node):
                self._tell_one(server)

    def node_lost(self, node: str, reason: str) -> None:
        """Requests of a server whose link has ended have ended, too."""

    # ---- what they are told ----

    async def _tell_often(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            self._look()
            for server in self._servers:
                server.look(asyncio.get_running_loop().time())
            self._tell()

    def _tell(self) -> None:
        self._pending = None
        for server in self._servers:
            self._tell_one(server)

    def _tell_one(self, server: ServerProcess) -> None:
        link = server.link
        if link is None or link.closed:
            return
        view, told = self._view(), server.told
        try:
            news = self._news()
            news.stopping, news.anew = self._stopping, told is None
            if view is not told:
                news.change = change(told or ClusterView(), view)
            link.send(news)
        except (EngineError, TypeError, ValueError, OverflowError) as error:
            logger.error("API server %d can't be told of the cluster: %s", server.index, error)
            server.told = None  # so all of it is to be told, once that is possible
        else:
            server.told = view


def peer_app(accept: Handler, door: Guard) -> web.Application:
    """What answers where other nodes dial this one: their links, and nothing else."""
    app = web.Application(middlewares=[openai_errors, door.middleware])
    for path in door.routes.places(PATH):
        app.router.add_get(path, accept)
    return app
