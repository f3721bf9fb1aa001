"""The actor that all others derive from, its typed handle, and a future that a loop can await.

Rules: every ask has a timeout; ask goes down, tell goes up; no blocking I/O in an actor.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, cast

import pykka
from pykka.messages import ProxyCall

logger = logging.getLogger(__name__)

ExcInfo = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]

ASK_SECONDS = 5.0  # the longest that anyone waits for an actor

A = TypeVar("A", bound="Actor")
P = ParamSpec("P")
R = TypeVar("R")


class LoopFuture(pykka.ThreadingFuture[R]):
    """An actor's answer that an event loop can await without being blocked.

    Pykka's own `await` waits in the loop's thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._done = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self, value: R | None = None) -> None:
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

    def __await__(self) -> Generator[None, None, R]:
        """Wait on the running loop. Raises TimeoutError after ASK_SECONDS."""
        yield from self._wait().__await__()
        return cast(R, self.get(timeout=0.0))

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
            # The loop may have been closed meanwhile, and the actor must not die of that.
            with contextlib.suppress(RuntimeError):
                waiter.get_loop().call_soon_threadsafe(_set, waiter)


def _set(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class Actor(pykka.ThreadingActor):
    """An actor whose answers can be awaited, and whose failure is told, not swallowed."""

    use_daemon_thread = True

    @staticmethod
    def _create_future() -> LoopFuture[Any]:
        return LoopFuture()

    @property
    def _handle(self) -> "Handle[Self]":
        """For what is to tell this actor something later, on another thread."""
        return Handle(self.actor_ref)

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


class Handle(Generic[A]):
    """Calls an actor by its methods: `node.tell(NodeActor.want, 2)`. Types are those of the method.

    A method is found by its name, so what a subclass overrides is what is called.
    """

    def __init__(self, ref: pykka.ActorRef[A]) -> None:
        self._actor = ref

    def ask(
        self, method: Callable[Concatenate[A, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> LoopFuture[R]:
        """Call a method; its result comes later, or ActorDeadError if the actor is dead."""
        call = ProxyCall((method.__name__,), args, kwargs)
        return cast(LoopFuture[R], self._actor.ask(call, block=False))

    def tell(
        self, method: Callable[Concatenate[A, P], object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Have a method called, and hear nothing of it. Raises ActorDeadError."""
        self._actor.tell(ProxyCall((method.__name__,), args, kwargs))

    def notify(
        self, method: Callable[Concatenate[A, P], object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Likewise, where it does not matter whether the actor has just died.

        That is for what its successor is told anyway, or need not know.
        """
        with contextlib.suppress(pykka.ActorDeadError):
            self.tell(method, *args, **kwargs)

    @property
    def alive(self) -> bool:
        """Whether the actor lives."""
        return self._actor.is_alive()

    def stop(self, within: float) -> None:
        """End the actor; blocks for so many seconds at most, and then raises pykka.Timeout."""
        self._actor.stop(timeout=within)

    def end(self) -> None:
        """Have the actor end once it has done what it was told before."""
        self._actor.stop(block=False)
