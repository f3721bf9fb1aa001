"""Requests that wait for an instance: for how long, and who looks again first."""

import asyncio
import itertools
from collections.abc import Sequence

import pytest

from llumnix.dataplane import waiting
from llumnix.dataplane.placer import NoInstance, Route
from llumnix.dataplane.waiting import HOPE_SECONDS, WaitingRoom, WaitLimits
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import SMALL, Gate, MeshNode, mesh

_tasks: set[asyncio.Task[None]] = set()  # kept: a loop holds its tasks weakly


async def _waiters(
    room: WaitingRoom, places: Sequence[tuple[str, int, float]], within: float = 9.0
) -> list[str]:
    """Have requests wait, by name, priority and arrival; the names of those who look, in turn."""
    looked: list[str] = []

    async def wait(name: str, priority: int, arrival: float) -> None:
        await room.wait(priority, arrival, within)
        looked.append(name)

    for place in places:
        _tasks.add(task := asyncio.create_task(wait(*place)))
        task.add_done_callback(_tasks.discard)
    await asyncio.sleep(0)
    return looked


PLACES = [
    ("batch", 10, 1.0),
    ("late", 0, 3.0),
    ("early", 0, 2.0),
    ("high", -1, 4.0),
    ("choice 1", 0, 5.0),
    ("choice 2", 0, 5.0),  # as with n > 1
]
IN_TURN = ["high", "early", "late", "choice 1", "choice 2", "batch"]


@on_loop
async def test_the_most_urgent_looks_first_and_then_the_first_come() -> None:
    room = WaitingRoom()
    looked = await _waiters(room, PLACES)
    assert looked == []
    room.look()
    await soon(lambda: len(looked) == len(PLACES))
    assert looked == IN_TURN


@on_loop
async def test_they_look_in_turn_without_any_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "RETRY_SECONDS", (0.02, 0.06))
    looked = await _waiters(WaitingRoom(), PLACES)
    await soon(lambda: len(looked) == len(PLACES))
    assert looked == IN_TURN


@on_loop
async def test_who_has_just_looked_waits_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "RETRY_SECONDS", (1.0, 1.0))
    room = WaitingRoom()
    looked = await _waiters(room, [("first", 0, 1.0)])
    await asyncio.sleep(0.5)
    more = await _waiters(room, [("second", -1, 2.0)])
    await soon(lambda: looked)
    assert more == [], "the timer was the first one's"
    await soon(lambda: more)


@on_loop
async def test_nobody_waits_longer_than_it_may() -> None:
    room = WaitingRoom()
    looked = await _waiters(room, PLACES[:1], within=0.02)
    await soon(lambda: looked)
    room.look()


@on_loop
async def test_requests_come_to_a_new_instance_in_turn() -> None:
    """Through the client: none is ready when they come, and then there is one."""
    async with mesh("a") as (a,):
        asked: list[int] = []

        async def none(tokens: int, priority: int, avoid: frozenset[str]) -> Route:
            raise NoInstance("no instance is ready")

        async def first(tokens: int, priority: int, avoid: frozenset[str]) -> Route:
            asked.append(priority)
            return a.route("a-0")

        a.dispatch = none
        priorities = [5, 0, -1, 3, -1]
        streams = [
            await a.ask(f"r{n}", [1, 2], priority=priority)
            for n, priority in zip(itertools.count(), priorities, strict=False)
        ]
        await soon(lambda: a.decisions >= len(priorities))
        await a.host()
        a.dispatch = first
        a.client.placer.instances_changed()
        await soon(lambda: all(stream.finish for stream in streams))
        assert asked == sorted(priorities)


# ---- for how long ----


def test_a_wait_ends_after_the_failover_timeout_while_none_starts() -> None:
    wait = WaitLimits(30.0, 600.0).begin(100.0)
    assert wait.left(129.0) == 1.0 and wait.left(130.0) == 0.0
    assert wait.sentence == "no instance was ready within 30 s (--failover-timeout)"


def test_a_wait_goes_on_for_one_that_starts_and_ends_soon_after_it_has_failed() -> None:
    wait = WaitLimits(30.0, 600.0).begin(100.0)
    wait.go_on(101.0)
    assert wait.left(101.0) == 29.0, "it is never shortened"
    wait.go_on(160.0)
    assert wait.left(160.0) == HOPE_SECONDS
    assert wait.sentence == (
        f"no instance was ready within {60 + HOPE_SECONDS:g} s (--failover-timeout), "
        "nor has one that was starting come up"
    )


def test_a_wait_ends_after_the_start_timeout_whatever_starts() -> None:
    wait = WaitLimits(30.0, 600.0).begin(100.0)
    for now in range(100, 1000):
        wait.go_on(float(now))
    assert wait.left(700.0) == 0.0
    assert wait.sentence == "no instance was ready within 600 s (--start-timeout)"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "RETRY_SECONDS", (0.02, 0.05))
    monkeypatch.setattr(waiting, "HOPE_SECONDS", 0.3)
    monkeypatch.setattr(waiting, "SHORTEST", 0.1)


def _limit(node: MeshNode, failover: float, start: float) -> None:
    node.client.placer._limits = WaitLimits(failover, start)


@on_loop
async def test_a_request_whose_engine_died_waits_for_one_that_starts(hasty: None) -> None:
    """Longer than the failover timeout; and so does one that comes meanwhile."""
    async with mesh("a") as (a,):
        _limit(a, 0.2, 30.0)
        gate = Gate()
        await a.host(clock=gate.clock())
        right = SMALL.block_size * 2
        begun = await a.ask("begun", [1, 2], right)
        gate.let(5)
        await soon(lambda: begun.tokens)
        a.awaited = True
        a.target = None
        a.engine("a-0").die("instance a-0 died")
        came = await a.ask("came", [1, 2], right)
        await asyncio.sleep(1.0)
        assert not begun.ended and not came.ended
        a.hosted.pop("a-0")
        await a.host()  # it is up, and nobody starts any more
        a.awaited = False
        a.client.placer.instances_changed()
        await soon(lambda: begun.finish and came.finish)
        assert len(begun.tokens) == right and begun.tokens == came.tokens


@on_loop
async def test_it_ends_when_what_started_does_not_come_up(hasty: None) -> None:
    async with mesh("a") as (a,):
        _limit(a, 0.2, 30.0)
        a.awaited = True
        stream = await a.ask("r", [1, 2])
        await asyncio.sleep(0.8)
        assert not stream.ended
        a.awaited = False
        assert await soon(lambda: stream.failure) < 2.0
        assert stream.failure is not None
        assert "nor has one that was starting come up" in stream.failure


@on_loop
async def test_it_ends_when_a_start_takes_too_long(hasty: None) -> None:
    async with mesh("a") as (a,):
        _limit(a, 0.2, 0.6)
        a.awaited = True
        stream = await a.ask("r", [1, 2])
        await soon(lambda: stream.failure)
        assert stream.failure == "no instance was ready within 1 s (--start-timeout)"
