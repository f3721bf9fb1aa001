"""A node's API servers in processes of their own: started, told of the cluster, started again."""

import asyncio
import logging
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess

from aiohttp import web
from prometheus_client.multiprocess import mark_process_dead
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.backoff import Backoff
from llumnix.cluster import ClusterView
from llumnix.control.view_change import change
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.frames import News, NodeNews
from llumnix.dataplane.hosted_request import Origin
from llumnix.dataplane.peer import PATH
from llumnix.dataplane.peer_link import Link
from llumnix.engine.base import EngineError
from llumnix.engine.vllm.launcher import start_fork_server
from llumnix.node.api_process import Settings, serve
from llumnix.node.api_servers import Open
from llumnix.node.host_calls import OPEN
from llumnix.node.shared_counts import CountsFile
from llumnix.node.sockets import Sockets
from llumnix.server.door.guard import Guard
from llumnix.server.errors import Handler, openai_errors
from llumnix.server.transport.listener import Listener
from llumnix.tasks import TaskSet

logger = logging.getLogger(__name__)

TOGETHER = 0.01  # seconds in which changes of the view become one
EVERY = 1.0  # seconds between two news where nothing changes
OPEN_SECONDS = 1.0  # for a server to say what it has open
SETTLED = 60.0  # seconds after which a server that ends is started again as if for the first time
LONGEST = 10.0  # seconds before it is started again and again
END_SECONDS = 5.0  # for a server to end when it is told to


@dataclass
class _Server:
    """One API server."""

    index: int
    backoff: Backoff
    process: ForkServerProcess | None = None
    life: str = ""
    starts: int = 0
    link: Link | None = None
    told: ClusterView | None = None  # the view that it has been told last over its link


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
        listener: Listener,
        sockets: Sockets,
        news: Callable[[], NodeNews],
        view: Callable[[], ClusterView],
        on_try: Callable[[], None],
    ) -> None:
        """`settings`: with which the server of an index is started, under a life, and whether that
        is the first time. `listener` answers other nodes. `news`: what the servers are told, but
        for the change of the `view`. `on_try`: called once, when one of them has opened its
        frontend, or could not."""
        self._settings = settings
        self._counts = counts
        self._exchange = exchange
        self._listener = listener
        self._sockets = sockets
        self._news = news
        self._view = view
        self._on_try = on_try
        self._servers = [_Server(n, Backoff(longest=LONGEST)) for n in range(count)]
        self._tasks = TaskSet()
        self._pending: asyncio.TimerHandle | None = None
        self._stopping = False
        self._closed = False
        self.tried = False
        exchange.bind(self)

    # ---- their life ----

    async def listen(self) -> None:
        """Start them all, and answer the links of nodes and of theirs. Raises OSError."""
        await self._listener.open([self._sockets.peer])
        for server in self._servers:
            self._tasks.spawn(self._keep(server), name=f"api-server-{server.index}")
        self._tasks.spawn(self._tell_often(), name="news")

    async def _keep(self, server: _Server) -> None:
        """Have a server run, and another one in its place when it ends."""
        while not self._closed:
            ended = asyncio.Event()
            began = asyncio.get_running_loop().time()
            try:
                process = await asyncio.to_thread(self._start, server)
            except OSError as error:
                logger.error("API server %d can't be started: %s", server.index, error)
                await asyncio.sleep(server.backoff.delay())
                continue
            loop = asyncio.get_running_loop()
            loop.add_reader(process.sentinel, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(process.sentinel)
            await asyncio.to_thread(process.join)
            self._gone(server, process)
            if self._closed:
                return
            lived = loop.time() - began
            if lived > SETTLED:
                server.backoff.reset()
            await asyncio.sleep(server.backoff.delay())

    def _start(self, server: _Server) -> ForkServerProcess:
        server.life = secrets.token_hex(8)
        self._exchange.own.add(server.life)
        settings = self._settings(server.index, server.life, not server.starts)
        server.starts += 1
        context = start_fork_server()
        process = context.Process(target=serve, args=(settings,), name=f"api-{server.index}")
        process.start()
        server.process = process
        logger.info("API server %d is process %d", server.index, process.pid)
        return process

    def _gone(self, server: _Server, process: ForkServerProcess) -> None:
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        if not self._stopping:
            logger.error("API server %d has ended (%s) and is started again", server.index, how)
        self._exchange.own.discard(server.life)
        self._counts.clear(server.index)
        mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
        server.process, server.link, server.told = None, None, None
        process.close()

    # ---- as the node sees them ----

    def home(self) -> Origin | None:
        """The first that is linked: it gets the engines' statistics."""
        return next((s.link for s in self._servers if s.link and not s.link.closed), None)

    def begin(self) -> None:
        """The node has started."""
        self.look()

    def look(self) -> None:
        """The cluster may have changed: tell them, soon."""
        if self._pending is None and not self._closed:
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
        """Give up the addresses, on which they listen no more."""
        for bound in self._sockets.public:
            bound.close()

    async def close_connections(self) -> None:
        """Close the links of other nodes; clients' connections have ended with the servers."""
        self._sockets.close()
        await self._listener.close()

    async def close(self) -> None:
        """End the servers."""
        self._closed = True
        if self._pending is not None:
            self._pending.cancel()
        running = [s.process for s in self._servers if s.process is not None]
        for process in running:
            process.terminate()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + END_SECONDS
        while any(s.process for s in self._servers) and loop.time() < deadline:
            await asyncio.sleep(0.02)
        for server in self._servers:
            if server.process is not None:
                logger.warning("API server %d did not end; killing it", server.index)
                server.process.kill()
        await self._tasks.close()

    async def open(self) -> Open:
        """What clients have open at all of them; one that does not answer counts as it did last."""
        running, requests = 0, list[str]()
        for server in self._servers:
            if server.link is None or server.link.closed:
                continue
            try:
                async with asyncio.timeout(OPEN_SECONDS):
                    said = await server.link.call("", OPEN, ())
            except (EngineError, TimeoutError):
                running += self._counts.row(server.index)[0]
                continue
            running += said[0]
            requests += said[1]
        return Open(running, requests)

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
            if server.life and link.life == server.life:
                server.link, server.told = link, None
                self._tell_one(server)

    def node_lost(self, node: str, reason: str) -> None:
        """Requests of a server whose link has ended have ended, too."""

    # ---- what they are told ----

    async def _tell_often(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            self._tell()

    def _tell(self) -> None:
        self._pending = None
        for server in self._servers:
            self._tell_one(server)

    def _tell_one(self, server: _Server) -> None:
        link = server.link
        if link is None or link.closed:
            return
        view, told = self._view(), server.told
        news = self._news()
        news.stopping = self._stopping
        news.anew = told is None
        if view is not told:
            news.change = change(told or ClusterView(), view)
        server.told = view
        try:
            link.send(news)
        except EngineError as error:
            logger.warning("API server %d can't be told of the cluster: %s", server.index, error)


def peer_app(accept: Handler, door: Guard) -> web.Application:
    """What answers where other nodes dial this one: their links, and nothing else."""
    app = web.Application(middlewares=[openai_errors, door.middleware])
    for path in door.routes.places(PATH):
        app.router.add_get(path, accept)
    return app
