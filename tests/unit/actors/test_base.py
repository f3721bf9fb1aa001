"""The future that both a thread and a loop can wait for, and actors whose end is told."""

import asyncio
import threading
import time
from typing import Any

import pykka
import pytest

from llumnix.actors import base
from llumnix.actors.base import Actor, LoopFuture
from tests.kit.loop import on_loop
from tests.kit.wait import eventually


class Worker(Actor):
    """Answers, fails, or waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self._go = threading.Event()

    def add(self, a: int, b: int) -> int:
        return a + b

    def fail(self) -> None:
        raise KeyError("no such thing")

    def add_later(self, a: int, b: int) -> Any:
        return self._handle.ask(Worker.add, a, b)

    def wait(self, go: threading.Event) -> str:
        go.wait(10.0)
        return "went"


@pytest.fixture
def worker() -> Any:
    return Worker.start().proxy()


def test_a_thread_gets_the_answer(worker: Any) -> None:
    assert worker.add(1, 2).get(timeout=5.0) == 3
    with pytest.raises(KeyError):
        worker.fail().get(timeout=5.0)
    assert worker.add(3, 4).get(timeout=5.0) == 7, "an exception goes to who asked"


def test_a_loop_gets_the_answer(worker: Any) -> None:
    @on_loop
    async def ask() -> None:
        assert await worker.add(1, 2) == 3
        answers = await asyncio.gather(*(_sum(worker, n) for n in range(50)))
        assert answers == [2 * n for n in range(50)]
        with pytest.raises(KeyError):
            await worker.fail()

    ask()


async def _sum(worker: Any, n: int) -> int:
    answer: int = await worker.add(n, n)
    return answer


def test_the_loop_goes_on_while_it_waits(worker: Any) -> None:
    go = threading.Event()

    @on_loop
    async def ask() -> None:
        async def let_go() -> None:
            go.set()

        # Were the loop blocked, nobody could let the actor go.
        answer, _ = await asyncio.gather(_wait(worker, go), let_go())
        assert answer == "went"

    ask()


async def _wait(worker: Any, go: threading.Event) -> str:
    answer: str = await worker.wait(go)
    return answer


def test_an_answer_that_is_there_already(worker: Any) -> None:
    @on_loop
    async def ask() -> None:
        future = worker.add(1, 2)
        assert future.get(timeout=5.0) == 3
        assert await future == 3

    ask()


def test_nobody_waits_for_ever(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ASK_SECONDS", 0.05)
    go = threading.Event()

    @on_loop
    async def ask() -> None:
        with pytest.raises(TimeoutError):
            await worker.wait(go)

    ask()
    with pytest.raises(pykka.Timeout):
        worker.wait(go).get(timeout=0.05)
    go.set()


def test_an_answer_that_comes_after_the_loop_has_given_up(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "ASK_SECONDS", 0.05)
    go = threading.Event()

    @on_loop
    async def ask() -> None:
        with pytest.raises(TimeoutError):
            await worker.wait(go)
        monkeypatch.setattr(base, "ASK_SECONDS", 30.0)
        go.set()
        assert await worker.add(1, 2) == 3

    ask()


def test_a_future_that_is_set_by_hand_from_another_thread() -> None:
    @on_loop
    async def ask() -> None:
        future = LoopFuture()
        thread = threading.Thread(target=_set_later, args=(future,))
        thread.start()
        assert await future == "value"
        thread.join()

    ask()


def _set_later(future: LoopFuture) -> None:
    time.sleep(0.02)
    future.set("value")


def test_what_kills_an_actor_is_told(worker: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker.fail.defer()
    eventually(lambda: not worker.actor_ref.is_alive())
    assert "no such thing" in caplog.text


def test_an_actor_can_be_told_something_by_itself(worker: Any) -> None:
    assert worker.add_later(1, 2).get(timeout=5.0).get(timeout=5.0) == 3


def test_a_ping_is_a_barrier(worker: Any) -> None:
    worker.add.defer(1, 2)
    assert worker.ping().get(timeout=5.0) is None
