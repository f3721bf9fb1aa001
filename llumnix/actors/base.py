"""The actor that all others derive from, and the future that both a thread and a loop can wait for.

Rules: every ask has a timeout; ask goes down, tell goes up; no blocking I/O in an actor.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Generator
from types import TracebackType
from typing import Any

import pykka

logger = logging.getLogger(__name__)

ExcInfo = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]

ASK_SECONDS = 5.0  # the longest that anyone waits for an actor


class LoopFuture(pykka.ThreadingFuture[Any]):
    """An actor's answer that an event loop can await without being blocked.

    Pykka's own `await` waits in the loop's thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._done = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self, value: Any = None) -> None:
        """Give the answer."""
        super().set(value)
        self._wake()

    def set_exception(
        self,
        exc_info: ExcInfo | None = None,
    ) -> None:
        """Give the exception that came instead of an answer."""
        super().set_exception(exc_info)
        self._wake()

    def __await__(self) -> Generator[None, None, Any]:
        """Wait on the running loop. Raises TimeoutError after ASK_SECONDS."""
        yield from self._wait().__await__()
        return self.get(timeout=0.0)

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._done:
                return
            self._waiter = loop.create_future()
        async with asyncio.timeout(ASK_SECONDS):
            await self._waiter

    def _wake(self) -> None:
        with self._lock:
            self._done = True
            waiter = self._waiter
        if waiter is not None:
            # A loop that has been closed waits no more, and the actor must not die of that.
            with contextlib.suppress(RuntimeError):
                waiter.get_loop().call_soon_threadsafe(_set, waiter)


def _set(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class Actor(pykka.ThreadingActor):
    """An actor whose answers can be awaited, and whose failure is told, not swallowed."""

    use_daemon_thread = True
    _proxy: Any = None  # of the actor itself, for those who are to tell it something later

    @staticmethod
    def _create_future() -> LoopFuture:
        return LoopFuture()

    def on_start(self) -> None:
        """Called by Pykka on the actor's own thread."""
        self._proxy = self.actor_ref.proxy()

    def ping(self) -> None:
        """Answer when everything sent before has been handled: a barrier for starts."""

    def on_failure(
        self,
        exception_type: type[BaseException] | None,
        exception_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Log what killed the actor; Pykka has no other witness."""
        logger.critical("actor %s died: %r", self, exception_value)
