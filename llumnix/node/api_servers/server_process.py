"""One API server's process, as the node has it: started, ended, and started again when it dies."""

import asyncio
import logging
import secrets
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess

from llumnix.backoff import Backoff
from llumnix.cluster import ClusterView, server_name
from llumnix.dataplane.peer_link import Link
from llumnix.engine.vllm.processes.launcher import start_fork_server
from llumnix.node.api_servers.api_process import Settings, serve

logger = logging.getLogger(__name__)

SETTLED = 60.0  # seconds after which a server that ends is started again as if for the first time
LONGEST = 10.0  # seconds before it is started again and again
LINKLESS = 120.0  # seconds without a link after which it is taken for dead


class ServerProcess:
    """A server of a node, and its successors; lives on the node's loop."""

    def __init__(
        self,
        index: int,
        settings: Callable[[int, str, bool], Settings],
        on_end: Callable[["ServerProcess", int], None],
    ) -> None:
        """`settings`: with which it is started, under a life, and whether that is the first time.
        `on_end`: told of each process that has ended, by its number, on the loop."""
        self.index = index
        self._settings = settings
        self._on_end = on_end
        self._backoff = Backoff(longest=LONGEST)
        self._process: ForkServerProcess | None = None
        self._life = ""
        self._ending = False  # nothing is started any more
        self._linked: float | None = None  # when it was linked last, or seen first
        self.ended = 0  # how many processes of it have ended
        self.started = False  # whether one has been started
        self.link: Link | None = None
        self.told: ClusterView | None = None  # the view that it has been told last over its link

    async def keep(self) -> None:
        """Have it run until `end`, again and again."""
        while not self._ending:
            try:
                process = await asyncio.to_thread(self._start)
            except Exception as error:  # of the fork server, or of what is to be pickled
                reason = f"{type(error).__name__}: {error}"
                logger.error("API server %d can't be started: %s", self.index, reason)
                self.ended += 1
                await asyncio.sleep(self._backoff.delay())
                continue
            lived = await self._watch(process)
            if lived > SETTLED:
                self._backoff.reset()
            if not self._ending:
                await asyncio.sleep(self._backoff.delay())

    def end(self) -> None:
        """Start nothing more."""
        self._ending = True

    def terminate(self) -> None:
        """Have the process end, if there is one."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Likewise, whatever it does."""
        if self._process is not None:
            logger.warning("API server %d does not end, or hangs; killing it", self.index)
            self._process.kill()

    def take(self, link: Link, node: str) -> bool:
        """Have it linked, if the link is that of its process."""
        if not (link.node == server_name(node, self.index) and link.life == self._life):
            return False
        self.link, self.told = link, None
        return True

    def look(self, now: float) -> None:
        """End a process that has had no link for long: it hangs, and its clients with it."""
        if self.linked or self._linked is None:
            self._linked = now
        elif now - self._linked > LINKLESS:
            self._linked = now
            self.kill()

    @property
    def linked(self) -> bool:
        """Whether it can be told something."""
        return self.link is not None and not self.link.closed

    def _start(self) -> ForkServerProcess:
        self._life = secrets.token_hex(8)
        settings = self._settings(self.index, self._life, not self.started)
        context = start_fork_server()
        process = context.Process(target=serve, args=(settings,), name=f"api-{self.index}")
        process.start()  # blocks while the fork server imports
        self._process, self.started = process, True
        if self._ending:
            process.kill()
        logger.info("API server %d is process %d", self.index, process.pid)
        return process

    async def _watch(self, process: ForkServerProcess) -> float:
        """Wait for the end of the process; how many seconds it has lived."""
        loop = asyncio.get_running_loop()
        began, ended = loop.time(), asyncio.Event()
        loop.add_reader(process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(process.sentinel)
        await asyncio.to_thread(process.join)
        if not self._ending:
            how = _said(process.exitcode or 0)
            logger.error("API server %d has ended (%s) and is started again", self.index, how)
        self.ended += 1
        self._process, self.link, self.told, self._linked = None, None, None, None
        self._on_end(self, process.pid or 0)
        process.close()
        return loop.time() - began


def _said(code: int) -> str:
    """How a process has ended, in a word or two."""
    try:
        return signal.Signals(-code).name if code < 0 else f"status {code}"
    except ValueError:
        return f"signal {-code}"
