"""Requests that wait for an instance: who looks again first."""

import asyncio
import itertools
from collections.abc import Sequence

import pytest

from llumnix.engine import waiting
from llumnix.engine.placer import NoInstance, Route
from llumnix.engine.waiting import WaitingRoom
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import mesh

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
