"""What an HTTP request has asked of engines, to be ended if nobody is left to wait for it.

Handlers end their own requests when they are told that their client has gone. But between them and
their client may be a middleware, vLLM's or an operator's, that drops a generator of tokens without
closing it: then it lives, and its request runs, until the garbage collector comes by.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from vllm.v1.engine import EngineCoreRequest

# Set in the handler's task, and so in all tasks that vLLM makes of it.
_opened: ContextVar[list[str] | None] = ContextVar("opened", default=None)


def enter(request: EngineCoreRequest) -> None:
    """Remember a request of the handler that this is called from."""
    ids = _opened.get()
    if ids is not None:
        ids.append(request.request_id)


@contextlib.contextmanager
def opened() -> Iterator[list[str]]:
    """Collect the ids of all requests for engines that are made in this context."""
    ids: list[str] = []
    _opened.set(ids)
    try:
        yield ids
    finally:
        _opened.set(None)  # the next request of this connection has the same task
