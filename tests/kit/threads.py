"""No test leaves a thread behind."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.kit.wait import eventually


@contextmanager
def no_thread_left() -> Iterator[None]:
    """Fails if a thread that began inside is still there some seconds after."""
    before = set(threading.enumerate())
    yield
    # gRPC's own threads end a moment after their channel.
    eventually(lambda: not (set(threading.enumerate()) - before), within=15)
