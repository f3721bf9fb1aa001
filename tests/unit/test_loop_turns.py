"""Requests in slices."""

import asyncio
import functools
import itertools
import time

from llumnix.loop_turns import Turns
from tests.kit.loop import on_loop


@on_loop
async def test_a_thousand_requests_leave_room_for_others() -> None:
    turns, passed = Turns(at_once=8), []

    async def come(number: int) -> None:
        await turns.take()
        passed.append(number)

    tasks = [asyncio.create_task(come(n)) for n in range(1000)]
    most, before = 0, 0
    while len(passed) < 1000:
        await asyncio.sleep(0)
        most, before = max(most, len(passed) - before), len(passed)
    assert passed == list(range(1000)), "in order"
    assert most <= 8
    await asyncio.gather(*tasks)


@on_loop
async def test_one_that_is_more_than_a_slice_passes_whole_and_others_wait_for_it() -> None:
    turns = Turns(at_once=8)
    await turns.take(32)
    later = asyncio.create_task(turns.take())
    for _ in range(3):
        await asyncio.sleep(0)
        assert not later.done()
    await later
    await asyncio.wait_for(turns.take(), 1)


@on_loop
async def test_one_that_is_cancelled_takes_no_turn() -> None:
    turns = Turns(at_once=1)
    await turns.take()
    await asyncio.sleep(0)  # the turn of those that follow
    first, gone, next_one = (asyncio.create_task(turns.take()) for _ in range(3))
    await asyncio.sleep(0)
    assert first.done() and not gone.done()
    gone.cancel()
    await next_one
    assert gone.cancelled()


@on_loop
async def test_what_is_called_in_turns_is_done_in_order_a_few_at_a_time() -> None:
    turns, done = Turns(at_once=8), []
    for number in range(100):
        turns.call(functools.partial(done.append, number))
    assert done == list(range(8)), "at once, as far as there is room"
    most, before = 0, 8
    while len(done) < 100:
        await asyncio.sleep(0)
        most, before = max(most, len(done) - before), len(done)
    assert done == list(range(100)) and most <= 8


@on_loop
async def test_requests_that_cost_much_are_alone_in_their_turn() -> None:
    """Sixteen of them in one turn would hold the loop for sixteen times as long."""
    turns, order = Turns(seconds=0.004), []

    async def come(number: int) -> None:
        await turns.take()
        order.append(number)
        until = time.perf_counter() + 0.005
        while time.perf_counter() < until:
            pass

    tasks = [asyncio.create_task(come(n)) for n in range(40)]
    passed = [0]
    while len(order) < 40:
        await asyncio.sleep(0)
        passed.append(len(order))
    assert order == list(range(40)), "in order"
    assert max(b - a for a, b in itertools.pairwise(passed)) == 1
    await asyncio.gather(*tasks)
    assert not turns._again and not turns._waiting
    await asyncio.wait_for(turns.take(32), 1)


@on_loop
async def test_with_time_left_as_many_pass_as_ever() -> None:
    turns, most = Turns(seconds=60.0), 0
    tasks = [asyncio.create_task(turns.take()) for _ in range(160)]
    while not all(task.done() for task in tasks):
        before = sum(task.done() for task in tasks)
        await asyncio.sleep(0)
        most = max(most, sum(task.done() for task in tasks) - before)
    assert most == 16
