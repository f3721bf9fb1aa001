"""How long a request holds what it has taken: until its handler has ended, and what it left behind.

An answer in the background is computed after its request has been answered, by a task of vLLM's.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class _Span:
    """One block of a handler, and the tasks that were left behind in it."""

    ends: list[Callable[[], None]]
    outer: "_Span | None"
    open: int = 1

    def close(self, _: Any = None) -> None:
        self.open -= 1
        if not self.open:
            for end in self.ends:
                end()


# Set in the handler's task, and so in all tasks that vLLM makes of it.
_span: ContextVar[_Span | None] = ContextVar("span", default=None)


@contextlib.contextmanager
def until_over(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` when this block has ended, and all tasks that it has left behind."""
    span = _Span([end], _span.get())
    _span.set(span)
    try:
        yield
    finally:
        _span.set(span.outer)  # the next request of this connection has the same task
        span.close()


def leave_behind(task: asyncio.Task[Any]) -> None:
    """Let the request of this handler go on until that task has ended, however it ends.

    A handler may have ended before, as its client has left, in a task that vLLM leaves alone: then
    the task is ended, too, of which nobody has been told.
    """
    span = _span.get()
    if span is not None and not span.open:
        task.cancel()
        return
    while span is not None:
        span.open += 1
        task.add_done_callback(span.close)
        span = span.outer


def at_end(end: Callable[[], None]) -> None:
    """Call `end` when the request of this handler has ended; at once if there is none."""
    span = _span.get()
    if span is None or not span.open:
        end()
    else:
        span.ends.append(end)
