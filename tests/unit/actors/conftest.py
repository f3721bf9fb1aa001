"""Actors run beside a loop of their own, as on a node; none may outlive its test."""

import asyncio
import threading
from collections.abc import Iterator

import pykka
import pytest

from tests.kit.threads import no_thread_left
from tests.kit.wait import eventually


class LoopThread:
    """An event loop that runs in a thread, as a node's does."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop", daemon=True)
        self._thread.start()

    def tasks(self) -> int:
        """How many tasks are under way."""
        return len(asyncio.all_tasks(self.loop))

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5.0)
        self.loop.close()


@pytest.fixture
def side() -> Iterator[LoopThread]:
    """A loop beside the test, which must end with no task left."""
    side = LoopThread()
    yield side
    try:
        eventually(lambda: side.tasks() == 0, within=15)
    finally:
        side.close()


@pytest.fixture(autouse=True)
def _no_actor_and_no_thread_left() -> Iterator[None]:
    with no_thread_left():
        yield
        try:
            pykka.ActorRegistry.stop_all(timeout=5.0)
        finally:  # one that hangs must not fail the next test
            for actor in pykka.ActorRegistry.get_all():
                pykka.ActorRegistry.unregister(actor)
