"""When an engine counts as hanging: real processes are stopped, are busy, or do nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from llumnix.engine.vllm import watchdog
from llumnix.engine.vllm.watchdog import Watchdog, activity
from tests.kit.loop import on_loop, soon
from tests.kit.wait import eventually

BUSY = "while True: pass"
IDLE = "import time; time.sleep(60)"
# Its child does nothing, and is the one that is stopped.
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {IDLE!r}])\n{BUSY}"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.05)


@contextmanager
def process(code: str) -> Iterator[int]:
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        yield child.pid
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


class Engine:
    """Answers when the test wants it."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.pings = 0
        self.found: list[str] = []

    async def ping(self) -> None:
        self.pings += 1
        await self.answers.wait()


@asynccontextmanager
async def watched(pid: int, hang: float = 0.4, step: float = 30.0) -> AsyncIterator[Engine]:
    engine = Engine()
    dog = Watchdog(engine.ping, lambda: activity(pid), engine.found.append, hang, step)
    dog.start()
    yield engine
    dog.stop()
    await asyncio.sleep(0)


def settled(pid: int) -> None:
    """Wait until it does nothing any more."""
    eventually(lambda: activity(pid).cpu > 10_000_000)
    last = -1

    def rests() -> bool:
        nonlocal last
        last, before = activity(pid).cpu, last
        return last == before

    eventually(rests, every=0.2)


@on_loop
async def test_an_engine_that_answers_is_left_alone() -> None:
    with process(IDLE) as pid:
        async with watched(pid) as engine:
            engine.answers.set()
            await soon(lambda: engine.pings > 12)
            assert not engine.found


@on_loop
async def test_an_engine_that_computes_may_be_silent() -> None:
    with process(BUSY) as pid:
        async with watched(pid, hang=0.3) as engine:
            await soon(lambda: engine.pings)
            await asyncio.sleep(1.0)
            assert not engine.found and engine.pings == 1


@on_loop
async def test_but_not_for_longer_than_a_step_may_take() -> None:
    with process(BUSY) as pid:
        async with watched(pid, step=0.5) as engine:
            await soon(lambda: engine.found)
            assert "the longest for a step" in engine.found[0]


@on_loop
async def test_an_engine_that_is_silent_and_does_nothing_hangs() -> None:
    with process(IDLE) as pid:
        settled(pid)
        async with watched(pid) as engine:
            await soon(lambda: engine.found)
            assert "it does nothing" in engine.found[0]


@on_loop
async def test_a_stopped_worker_is_enough() -> None:
    """Whoever waits for it may well be busy doing so."""
    with process(PARENT) as pid:
        eventually(lambda: _children(pid))
        async with watched(pid) as engine:
            await soon(lambda: engine.pings)
            os.kill(_children(pid)[0], signal.SIGSTOP)
            await soon(lambda: engine.found)
            assert "one of its processes is stopped" in engine.found[0]


@on_loop
async def test_a_node_that_was_stopped_itself_blames_no_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "PAUSE_SECONDS", 0.2)
    with process(IDLE) as pid:
        settled(pid)
        async with watched(pid, hang=0.6) as engine:
            await soon(lambda: engine.pings)
            time.sleep(0.8)  # the loop stands still, as it does under SIGSTOP
            await asyncio.sleep(0.2)
            assert not engine.found
            engine.answers.set()
            await soon(lambda: engine.pings > 3)
            assert not engine.found


def test_a_process_that_has_ended_does_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert activity(child.pid) == watchdog.Activity(0, False)


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(child) for child in children.read().split()]
