"""One engine's life: it starts, fails, dies, drains and stops; each change is told."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llumnix.actors import instance as instance_module
from llumnix.actors.instance import InstanceActor, Life, Report
from llumnix.cluster import InstanceState
from llumnix.dataplane.frames import Submit
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.engine.sim.instance import SimEngine
from tests.kit.engines import FACTS, FailingEngine, IdleEngine
from tests.kit.mesh import SMALL
from tests.kit.requests import core_request
from tests.kit.wait import eventually
from tests.unit.actors.conftest import LoopThread


class Nobody:
    """An API server to which nothing matters."""

    node = "a"

    def deliver(self, frame: Any, stats: Any = None) -> None:
        pass


class Supervised:
    """An instance's actor, the engines that it has made and what it has told."""

    def __init__(self, side: LoopThread, make: Callable[[], Any]) -> None:
        self.side = side
        self.made: list[HostedInstance] = []
        self.reports: list[Report] = []
        self._make = make
        self.proxy: Any = InstanceActor.start(
            "a-0", self._host, side.loop, self.reports.append
        ).proxy()

    def _host(self) -> HostedInstance:
        self.made.append(HostedInstance(self._make(), Nobody, on_load=lambda: None))
        return self.made[-1]

    @property
    def lives(self) -> list[Life]:
        return [report.life for report in self.reports]

    @property
    def engine(self) -> Any:
        return self.made[-1].engine

    def reaches(self, *lives: Life, within: float = 20.0) -> None:
        eventually(lambda: tuple(self.lives) == lives, within)

    def on_loop(self, call: Callable[..., Any], *args: Any) -> None:
        self.side.loop.call_soon_threadsafe(call, *args)

    def submit(self, name: str) -> None:
        """Give the instance a request."""
        hosted = self.made[-1]
        frame = Submit("a-0", 1, 1, core_request(name, [1, 2, 3]))
        asyncio.run_coroutine_threadsafe(hosted.submit(Nobody(), frame), self.side.loop).result(5)


@pytest.fixture(autouse=True)
def _short_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_module, "BACKOFF_FIRST", 0.05)
    monkeypatch.setattr(instance_module, "DRAIN_POLL", 0.01)


@pytest.fixture(autouse=True)
def no_task_failed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What happens on the loop late, when the actor has gone, is no error either."""
    yield
    said = [r.getMessage() for r in caplog.get_records("call")]
    assert "an instance's task failed" not in said


@pytest.fixture
def idle(side: LoopThread) -> Iterator[Supervised]:
    """An instance that is ready."""
    with ready(side) as supervised:
        yield supervised


@contextlib.contextmanager
def ready(side: LoopThread) -> Iterator[Supervised]:
    supervised = Supervised(side, lambda: IdleEngine("a-0"))
    supervised.proxy.begin.defer()
    supervised.reaches(Life.STARTING, Life.READY)
    yield supervised
    if supervised.lives[-1] is not Life.STOPPED:
        supervised.proxy.halt.defer()
        eventually(lambda: supervised.lives[-1] is Life.STOPPED)


def test_it_tells_its_facts_when_it_is_ready(idle: Supervised) -> None:
    assert idle.reports[0] == Report("a-0", Life.STARTING, None)
    assert idle.reports[1] == Report("a-0", Life.READY, FACTS)
    assert [r.state for r in idle.reports] == [InstanceState.STARTING, InstanceState.READY]


def test_a_modelled_engine_lives_as_well(side: LoopThread) -> None:
    supervised = Supervised(side, lambda: SimEngine("a-0", SMALL))
    supervised.proxy.begin.defer()
    supervised.reaches(Life.STARTING, Life.READY)
    assert supervised.reports[1].facts is not None
    assert supervised.reports[1].facts.total_blocks == SMALL.total_blocks
    supervised.proxy.drain.defer(5.0)
    supervised.reaches(Life.STARTING, Life.READY, Life.DRAINING, Life.STOPPED)


def test_a_start_that_fails_is_tried_again_later_and_later(
    side: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    supervised = Supervised(side, lambda: FailingEngine("a-0"))
    supervised.proxy.begin.defer()
    eventually(lambda: supervised.lives.count(Life.BACKING_OFF) >= 4)
    assert supervised.lives[:4] == [Life.STARTING, Life.BACKING_OFF] * 2
    failed = supervised.reports[1]
    assert failed.reason == "instance a-0 did not start: no such model"
    assert failed.state is InstanceState.STARTING
    failures = [r.failed_starts for r in supervised.reports if r.life is Life.BACKING_OFF]
    assert failures[:3] == [1, 2, 3]
    said = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert said[0].getMessage() == "instance a-0 did not start: no such model; next start in 0 s"
    assert "\n" not in caplog.messages[0]
    supervised.proxy.halt.defer()
    eventually(lambda: supervised.lives[-1] is Life.STOPPED)
    assert len(supervised.made) == supervised.lives.count(Life.STARTING) >= 4


def test_it_backs_off_from_the_start_again_once_it_was_up(
    idle: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance_module, "STEADY_SECONDS", 0.0)
    monkeypatch.setattr(instance_module, "BACKOFF_FIRST", 0.05)
    for n in range(1, 6):
        idle.on_loop(idle.engine.die, f"instance a-0 died: {n}")
        eventually(lambda n=n: idle.lives.count(Life.READY) == n + 1)
    reasons = [r.reason for r in idle.reports if r.life is Life.BACKING_OFF]
    assert reasons == [f"instance a-0 died: {n}" for n in range(1, 6)]
    assert all(hosted.engine.stops >= 1 for hosted in idle.made[:-1]), "dead ones are cleared away"
    assert not any(r.failed_starts for r in idle.reports), "each start was a good one"


def test_one_that_dies_soon_after_each_start_backs_off_longer(
    side: LoopThread, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance_module, "BACKOFF_FIRST", 1e-6)
    monkeypatch.setattr(instance_module, "BACKOFF_LONGEST", 32e-6)
    waits: list[float] = []
    later = instance_module.InstanceActor._later

    async def _later(self: InstanceActor, delay: float) -> None:
        waits.append(delay)
        await later(self, delay)

    monkeypatch.setattr(instance_module.InstanceActor, "_later", _later)
    with ready(side) as idle:
        for n in range(1, 9):
            idle.on_loop(idle.engine.die, f"instance a-0 died: {n}")
            eventually(lambda n=n: idle.lives.count(Life.READY) == n + 1)
    longest = [1, 2, 4, 8, 16, 32, 32, 32]
    assert len(waits) == len(longest)
    assert all(most / 2 <= wait * 1e6 <= most for wait, most in zip(waits, longest, strict=True))


@pytest.mark.parametrize("where", ["made", "started"])
def test_an_unexpected_error_is_a_failed_start(
    side: LoopThread, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine = IdleEngine("a-0")

    async def start(events: Any) -> Any:
        raise OSError("no space left\non device")

    def make() -> Any:
        if where == "made":
            raise OSError("no space left\non device")
        return engine

    monkeypatch.setattr(engine, "start", start)
    supervised = Supervised(side, make)
    supervised.proxy.begin.defer()
    eventually(lambda: Life.BACKING_OFF in supervised.lives)
    assert supervised.reports[1].reason == (
        "instance a-0 did not start: OSError: no space left on device"
    )
    assert engine.stops >= (where == "started"), "what was half started is stopped"
    supervised.proxy.halt.defer()
    eventually(lambda: supervised.lives[-1] is Life.STOPPED)


def test_what_a_former_engine_says_late_is_ignored(idle: Supervised) -> None:
    former = idle.engine
    idle.on_loop(former.die, "it died")
    idle.reaches(Life.STARTING, Life.READY, Life.BACKING_OFF, Life.STARTING, Life.READY)
    idle.on_loop(former.die, "an echo")
    idle.proxy.ping().get(timeout=5.0)
    eventually(lambda: idle.side.tasks() == 0)
    idle.proxy.ping().get(timeout=5.0)
    assert idle.lives[-1] is Life.READY and len(idle.made) == 2


def test_draining_waits_for_its_requests(idle: Supervised) -> None:
    idle.submit("r1")
    idle.submit("r2")
    idle.proxy.drain.defer(10.0)
    idle.reaches(Life.STARTING, Life.READY, Life.DRAINING)
    assert idle.reports[-1].facts == FACTS, "others go on seeing what it is"
    assert idle.reports[-1].state is InstanceState.DRAINING
    hosted = idle.made[0]
    asyncio.run_coroutine_threadsafe(hosted.cancel(["r1"]), idle.side.loop).result(5)
    idle.proxy.ping().get(timeout=5.0)
    assert idle.engine.stops == 0
    asyncio.run_coroutine_threadsafe(hosted.cancel(["r2"]), idle.side.loop).result(5)
    idle.reaches(Life.STARTING, Life.READY, Life.DRAINING, Life.STOPPED)
    assert idle.engine.stops == 1


def test_a_drain_can_be_called_off(idle: Supervised) -> None:
    idle.submit("r1")
    idle.proxy.drain.defer(10.0)
    for _ in range(2):  # twice is no more than once
        idle.proxy.keep.defer()
    idle.reaches(Life.STARTING, Life.READY, Life.DRAINING, Life.READY)
    assert idle.reports[-1].facts == FACTS
    eventually(lambda: idle.side.tasks() == 0)
    assert idle.engine.stops == 0 and len(idle.made[0].requests) == 1
    idle.proxy.keep.defer()
    idle.proxy.drain.defer(0.1)
    idle.reaches(*[Life.STARTING, *[Life.READY, Life.DRAINING] * 2, Life.STOPPED])


def test_a_drain_that_has_ended_cannot_be_called_off(idle: Supervised) -> None:
    idle.proxy.drain.defer(10.0)
    idle.reaches(Life.STARTING, Life.READY, Life.DRAINING, Life.STOPPED)
    idle.proxy.keep.defer()
    idle.proxy.ping().get(timeout=5.0)
    assert idle.lives[-1] is Life.STOPPED


def test_one_that_dies_while_its_drain_is_called_off_starts_anew(idle: Supervised) -> None:
    idle.submit("r1")
    idle.proxy.drain.defer(10.0)
    idle.reaches(Life.STARTING, Life.READY, Life.DRAINING)
    go_on = threading.Event()
    idle.on_loop(go_on.wait, 5.0)
    idle.proxy.keep.defer()
    idle.proxy.went_down.defer(1, "it died")
    idle.proxy.ping().get(timeout=5.0)
    go_on.set()
    idle.reaches(Life.STARTING, Life.READY, Life.DRAINING, Life.STARTING, Life.READY)
    assert len(idle.made) == 2


def test_draining_ends_at_its_deadline(idle: Supervised, caplog: pytest.LogCaptureFixture) -> None:
    idle.submit("r1")
    idle.proxy.drain.defer(0.1)
    idle.reaches(Life.STARTING, Life.READY, Life.DRAINING, Life.STOPPED)
    assert "instance a-0 stops after 0 s with 1 requests: r1" in caplog.messages
    assert len(idle.made[0].requests) == 0, "its origin was told"


def test_an_actor_that_dies_leaves_no_engine(idle: Supervised) -> None:
    idle.proxy.came_up.defer("no number of arguments")
    eventually(lambda: idle.engine.stops == 1)
    idle.reports.append(Report("a-0", Life.STOPPED, None))


def test_halting_waits_for_nothing(idle: Supervised) -> None:
    idle.submit("r1")
    idle.proxy.halt.defer()
    idle.reaches(Life.STARTING, Life.READY, Life.STOPPED)
    assert idle.engine.stops == 1
    idle.proxy.halt.defer()
    idle.proxy.drain.defer(1.0)
    idle.proxy.ping().get(timeout=5.0)
    assert idle.lives[-1] is Life.STOPPED


def test_halting_while_it_drains(idle: Supervised) -> None:
    idle.submit("r1")
    idle.proxy.drain.defer(10.0)
    idle.proxy.halt.defer()
    eventually(lambda: Life.STOPPED in idle.lives, within=2)
    # As the node does with one that has stopped.
    idle.proxy.actor_ref.stop()
    hosted = idle.made[0]
    asyncio.run_coroutine_threadsafe(hosted.cancel(["r1"]), idle.side.loop).result(5)
    eventually(lambda: idle.side.tasks() == 0)


@pytest.mark.parametrize("order", ["halt", "drain"])
def test_stopping_while_it_starts(side: LoopThread, order: str) -> None:
    never = asyncio.Event()
    supervised = Supervised(side, lambda: IdleEngine("a-0", up=never))
    supervised.proxy.begin.defer()
    supervised.reaches(Life.STARTING)
    if order == "halt":
        supervised.proxy.halt.defer()
    else:
        supervised.proxy.drain.defer(5.0)
    eventually(lambda: supervised.lives[-1] is Life.STOPPED)
    eventually(lambda: side.tasks() == 0)
    supervised.proxy.ping().get(timeout=5.0)
    assert supervised.lives[-1] is Life.STOPPED
    assert len(supervised.made) == 1, "it is not started again"


def test_stopping_while_it_backs_off(side: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_module, "BACKOFF_FIRST", 1.5)
    supervised = Supervised(side, lambda: FailingEngine("a-0"))
    supervised.proxy.begin.defer()
    supervised.reaches(Life.STARTING, Life.BACKING_OFF)
    supervised.proxy.drain.defer(5.0)
    supervised.reaches(Life.STARTING, Life.BACKING_OFF, Life.DRAINING, Life.STOPPED)
    supervised.proxy.actor_ref.stop()
    eventually(lambda: side.tasks() == 0)
    assert len(supervised.made) == 1
