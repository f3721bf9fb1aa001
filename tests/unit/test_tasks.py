"""Background tasks have an owner: it knows which run, ends them, and hears of none that fails."""

import asyncio
import gc
import weakref

import pytest

from llumnix.tasks import TaskSet
from tests.kit.loop import on_loop, soon


@on_loop
async def test_a_task_is_kept_while_it_runs_and_no_longer() -> None:
    """The loop holds it weakly, and nothing else holds the future that it waits for."""
    tasks, ends = TaskSet(), weakref.WeakSet["asyncio.Future[None]"]()

    async def work() -> None:
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ends.add(end)
        await end

    tasks.spawn(work())
    await asyncio.sleep(0)
    gc.collect()
    (end,) = ends
    end.set_result(None)
    await soon(lambda: not tasks)


@on_loop
async def test_a_close_cancels_what_runs_and_waits_for_its_end() -> None:
    tasks, ended = TaskSet(), list[str]()

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)  # it clears up
            ended.append(name)

    for name in ("first", "second"):
        tasks.spawn(work(name))
    await asyncio.sleep(0)
    await tasks.close()
    assert ended == ["first", "second"]
    await soon(lambda: not tasks)


@on_loop
async def test_a_failure_is_logged_and_ends_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    tasks, go_on = TaskSet(), asyncio.Event()

    async def fail() -> None:
        raise RuntimeError("a bug")

    async def work() -> None:
        await go_on.wait()

    tasks.spawn(fail(), name="the failing")
    other = tasks.spawn(work())
    await soon(lambda: len(tasks) == 1)
    assert caplog.messages == ["the task the failing failed"]
    assert "a bug" in caplog.text and not other.done()
    await tasks.close()
    assert other.cancelled() and len(caplog.messages) == 1, "who is cancelled has not failed"


@on_loop
async def test_who_waits_for_a_task_hears_of_its_failure_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks = TaskSet()

    async def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await tasks.own(fail())
    assert not tasks and not caplog.records


@on_loop
async def test_what_a_task_begins_at_its_end_is_ended_too() -> None:
    tasks, ended = TaskSet(), asyncio.Event()

    async def end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            tasks.spawn(end())

    tasks.spawn(work())
    await asyncio.sleep(0)
    await tasks.close()
    assert not tasks and ended.is_set()
