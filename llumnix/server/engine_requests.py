"""What an HTTP request has asked of engines, to be ended if nobody is left to wait for it.

Handlers end their own requests when they are told that their client has gone. But between them and
their client may be a middleware, vLLM's or an operator's, that drops a generator of tokens without
closing it: then it lives, and its request runs, until the garbage collector comes by.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreRequest


@dataclass(slots=True)
class Opened:
    """The requests for engines of one HTTP request."""

    ids: list[str] = field(default_factory=list)
    end: Callable[[list[str]], None] | None = None  # once nobody waits for them any more

    def abandon(self, end: Callable[[list[str]], None]) -> None:
        """End them, and those that a task of the handler's opens from now on."""
        self.end = end
        end(self.ids)


# Set in the handler's task, and so in all tasks that vLLM makes of it.
_opened: ContextVar[Opened | None] = ContextVar("opened", default=None)


def enter(request: EngineCoreRequest) -> None:
    """Remember a request of the handler that this is called from."""
    asked = _opened.get()
    if asked is None:
        return
    asked.ids.append(request.request_id)
    if asked.end is not None:
        asked.end([request.request_id])


@contextlib.contextmanager
def opened() -> Iterator[Opened]:
    """Collect all requests for engines that are made in this context."""
    asked = Opened()
    _opened.set(asked)
    try:
        yield asked
    finally:
        _opened.set(None)  # the next request of this connection has the same task
