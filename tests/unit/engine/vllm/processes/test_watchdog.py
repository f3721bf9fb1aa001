"""When an engine counts as hanging: real processes are stopped, are busy, or do nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from llumnix.engine.vllm.processes import watchdog
from llumnix.engine.vllm.processes.watchdog import (
    LOOK_SECONDS,
    Activity,
    Case,
    Look,
    Machine,
    Patience,
    Watchdog,
    activity,
)
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
async def watched(
    pid: int, hang: float = 0.4, step: float = 30.0, machine: Machine | None = None
) -> AsyncIterator[Engine]:
    engine = Engine()
    dog = Watchdog(
        *("a-0", engine.ping, lambda: activity(pid), engine.found.append),
        *(Patience(hang=hang, step=step), machine or Machine()),
    )
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
async def test_a_node_that_was_stopped_itself_blames_no_engine() -> None:
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
    assert activity(child.pid) == Activity(0)


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(child) for child in children.read().split()]


# ---- a machine that is short of something ----

RESTS = Activity(cpu=5)
STARVED = Activity(cpu=5, wants_cpu=True)
SWAPPED_OUT = Activity(cpu=5, in_kernel=True)
STOPPED = Activity(cpu=5, stopped=True)
SECOND = int(1 / LOOK_SECONDS)  # looks


def idle_after(seconds: int, *looks: Look) -> float:
    """How long an engine counts as idle that is seen so, in turn, for so many seconds."""
    case = Case(Activity(cpu=5))
    for number in range(seconds * SECOND):
        case.add(looks[number % len(looks)])
    assert case.waited == seconds, "the longest for a step is counted all the same"
    return case.idle


@pytest.fixture
def half_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", LOOK_SECONDS)


@pytest.mark.parametrize(
    ("look", "idle"),
    [
        (Look(0.5, RESTS), 20.0),
        (Look(0.5, RESTS, paging=False), 20.0),
        (Look(0.5, RESTS, paging=True), 0.0),
        (Look(0.5, RESTS, paging=True, others=True), 20.0),
        (Look(1.2, RESTS), 0.0),  # the node itself comes to look late: nobody has time
        (Look(0.8, RESTS), 12.0),
        (Look(1.2, RESTS, others=True), 20.0),
        (Look(0.5, STARVED), 0.0),
        (Look(0.5, STARVED, others=True), 0.0),  # slow, but it would go on
        (Look(0.5, SWAPPED_OUT, paging=True), 0.0),
        (Look(0.5, SWAPPED_OUT, paging=True, others=True), 0.0),
        (Look(0.5, SWAPPED_OUT), 0.0),  # it is not known what it waits for
        (Look(0.5, SWAPPED_OUT, paging=False), 20.0),  # a driver that hangs
        (Look(0.5, STOPPED), 20.0),
        (Look(0.5, STOPPED, paging=True), 20.0),
        (Look(1.2, STOPPED), 20.0),
    ],
)
def test_what_counts_as_doing_nothing(half_seconds: None, look: Look, idle: float) -> None:
    assert idle_after(20, look) == pytest.approx(idle)


def test_a_hang_is_found_though_the_machine_is_short_at_times(half_seconds: None) -> None:
    looks = [Look(0.5, RESTS), Look(2.0, RESTS), Look(0.5, RESTS, paging=True)]
    assert idle_after(18, *looks) == pytest.approx(6.0)


def test_an_engine_that_is_slow_is_not_idle(half_seconds: None) -> None:
    """Each now and then it gets a page, or a moment."""
    case = Case(RESTS)
    for number in range(100):
        case.add(Look(0.5, Activity(cpu=5 + number // 4)))
        assert case.idle <= 2.0


def pressure(folder: Path, memory: float, io: float) -> None:
    """What the kernel would say of so many seconds of waiting."""
    for name, seconds in (("memory", memory), ("io", io)):
        line = f"avg10=0.00 avg60=0.00 avg300=0.00 total={seconds * 1e6:.0f}"
        (folder / name).write_text(f"some {line}\nfull {line}\n")


def test_what_the_kernel_says_of_waiting(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.stalled() is None
    pressure(tmp_path, 1.5, 0.25)
    assert machine.stalled() == 1.5
    pressure(tmp_path, 1.5, 2.0)
    assert machine.stalled() == 2.0
    (tmp_path / "io").write_text("")
    assert machine.stalled() is None


def test_this_kernel_says_it_too() -> None:
    said = Machine().stalled()
    assert (said is None) is not Path("/proc/pressure/memory").exists()


def test_whether_others_progress() -> None:
    now = 100.0
    machine = Machine(clock=lambda: now)
    machine.heard("a-0", 99.9)
    assert machine.others_progress("a-1") and not machine.others_progress("a-0")
    now = 102.0
    assert not machine.others_progress("a-1")


@on_loop
async def test_an_engine_of_a_machine_that_pages_is_left_alone_until_another_one_goes_on(
    tmp_path: Path,
) -> None:
    """The machine is short of memory all the time: its count goes up as fast as the clock."""

    class Paging(Machine):
        def stalled(self) -> float | None:
            return time.monotonic()

    machine = Paging(tmp_path)
    with process(IDLE) as pid:
        settled(pid)
        async with watched(pid, hang=0.3, machine=machine) as engine:
            await soon(lambda: engine.pings)
            await asyncio.sleep(1.0)
            assert not engine.found
            while not engine.found:
                machine.heard("a-1", time.monotonic())
                await asyncio.sleep(0.02)
            assert "it does nothing" in engine.found[0]


@on_loop
async def test_a_stopped_engine_is_found_while_the_machine_pages(tmp_path: Path) -> None:
    class Paging(Machine):
        def stalled(self) -> float | None:
            return time.monotonic()

    with process(BUSY) as pid:
        async with watched(pid, machine=Paging(tmp_path)) as engine:
            await soon(lambda: engine.pings)
            os.kill(pid, signal.SIGSTOP)
            assert await soon(lambda: engine.found) < 5.0
            assert "one of its processes is stopped" in engine.found[0]


def test_who_computes_wants_a_cpu_and_who_is_stopped_does_not() -> None:
    with process(BUSY) as pid:
        eventually(lambda: activity(pid).wants_cpu)
        assert not activity(pid).stopped
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: activity(pid).stopped)
        assert not activity(pid).wants_cpu
    with process(IDLE) as pid:
        settled(pid)
        # On a busy machine it may stand in the queue for a CPU once more, before it sleeps.
        eventually(lambda: (seen := activity(pid)) == Activity(seen.cpu))
