"""What is asked of a request whose response vLLM stores, in its handler's task."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from llumnix.engine.vllm.frontend.stored_responses import Handler
from llumnix.server.spans import at_end, leave_behind

VALUE_BYTES = 128  # of a value or key, beside its characters

# Set in the handler's task, and so in all tasks that vLLM makes of it.
_body: ContextVar[bytes] = ContextVar("body", default=b"")


@contextlib.contextmanager
def of_body(body: bytes) -> Iterator[None]:
    """Let what is stored in this block count as what this body is in memory."""
    _body.set(body)
    try:
        yield
    finally:
        _body.set(b"")  # the next request of this connection has the same task


def body_bytes() -> int:
    """Roughly what the body of the request that is handled here is in memory."""
    body = _body.get()
    return 2 * len(body) + VALUE_BYTES * (body.count(b",") + body.count(b":"))


HANDLER = Handler(body_bytes, leave_behind, at_end)
