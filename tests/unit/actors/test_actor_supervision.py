"""An actor that died is started again and told what it must know; a bug that repeats is not."""

import asyncio
import threading
from typing import Any

import pytest
from pykka import ActorDeadError

from llumnix.actors import actor_supervision as supervision_module
from llumnix.actors.actor_supervision import (
    DEATHS,
    DEATHS_SECONDS,
    LOOK_SECONDS,
    Supervised,
    Supervision,
)
from llumnix.actors.base import Actor
from tests.kit.loop import on_loop, soon
from tests.kit.wait import eventually


class Clerk(Actor):
    """Remembers the last thing that it was told."""

    def __init__(self) -> None:
        super().__init__()
        self._news = "nothing"

    def tell(self, news: str) -> None:
        self._news = news

    def ask(self) -> str:
        return self._news

    def fail(self) -> None:
        raise ValueError("a bug")

    def wait(self, until: threading.Event) -> None:
        until.wait(30.0)


def supervised(clock: Any = None) -> Supervised[Clerk]:
    arguments = {"clock": clock} if clock else {}
    return Supervised(Clerk.start, lambda clerk: clerk.tell(Clerk.tell, "the view"), **arguments)


def die(clerk: Supervised[Clerk]) -> None:
    clerk.tell(Clerk.fail)
    eventually(lambda: not clerk.alive)


def test_a_successor_has_the_same_name_and_knows_what_it_must() -> None:
    clerk = supervised()
    clerk.tell(Clerk.tell, "something else")
    assert clerk.ask(Clerk.ask).get(timeout=5) == "something else"
    die(clerk)
    with pytest.raises(ActorDeadError):
        clerk.tell(Clerk.tell, "unheard")
    clerk.start_again()
    assert clerk.ask(Clerk.ask).get(timeout=5) == "the view"
    clerk.stop(5.0)


def test_deaths_long_ago_are_forgotten() -> None:
    now = 0.0
    clerk = supervised(lambda: now)
    for _ in range(3 * DEATHS):
        die(clerk)
        clerk.start_again()
        assert clerk.alive
        now += DEATHS_SECONDS / (DEATHS - 1)
    clerk.stop(5.0)


@on_loop
async def test_supervision_starts_again_and_gives_up_in_the_end() -> None:
    given_up: list[str] = []
    supervision = Supervision(asyncio.get_running_loop(), given_up.append)
    clerk = supervision.keep(Clerk.start, lambda clerk: clerk.tell(Clerk.tell, "the view"))
    for _ in range(DEATHS - 1):
        before = clerk._actor  # it may be dead for less than the time between two looks
        clerk.tell(Clerk.fail)
        await soon(lambda before=before: clerk._actor is not before)
        assert await clerk.ask(Clerk.ask) == "the view" and not supervision.fault
    clerk.tell(Clerk.fail)
    await soon(lambda: given_up)
    assert given_up == ["Clerk dies again and again"] == [supervision.fault]
    assert await clerk.ask(Clerk.ask) == "the view", "the node is yet to be emptied"
    clerk.tell(Clerk.fail)
    await soon(lambda: not clerk.alive)
    await asyncio.sleep(3 * LOOK_SECONDS)
    assert not clerk.alive and len(given_up) == 1
    supervision.stop()


@on_loop
async def test_one_that_is_blocked_keeps_none_of_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervision_module, "ASK_SECONDS", 0.3)
    supervision = Supervision(asyncio.get_running_loop(), lambda sentence: None)
    first, blocked, last = [supervision.keep(Clerk.start) for _ in range(3)]
    etcd_answers = threading.Event()
    blocked.tell(Clerk.wait, etcd_answers)
    supervision.stop()
    assert not first.alive and not last.alive
    assert caplog.messages == ["Clerk has not ended within 0.3 s"]
    etcd_answers.set()
    await soon(lambda: not blocked.alive)
