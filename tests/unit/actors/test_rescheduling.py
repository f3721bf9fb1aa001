"""What a manager wishes is written without its waiting; what comes of that is told."""

import asyncio
import threading

import pytest

from llumnix.actors.manager import MoveCommand, Outcome, Rescheduling
from llumnix.control.desired import Wish
from llumnix.control.etcd.errors import EtcdRefused, EtcdUnavailable
from tests.kit.wait import eventually
from tests.unit.actors.conftest import LoopThread

WISH = Wish(17, {"a": 2}, {"a": 1})


async def no_move(command: MoveCommand) -> Outcome:
    raise AssertionError("nothing is commanded here")


def test_nobody_waits_for_etcd(side: LoopThread) -> None:
    written: list[Wish] = []
    answers = threading.Event()

    def put_desired(wish: Wish) -> None:
        answers.wait(5.0)
        written.append(wish)

    Rescheduling(side.loop, no_move, put_desired, 1.0).wish(WISH)
    beat = threading.Event()
    side.loop.call_soon_threadsafe(beat.set)
    assert beat.wait(2.0) and not written
    answers.set()
    eventually(lambda: written == [WISH])
    _end_threads(side)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (EtcdRefused("this node does not lead any more"), ": this node does not lead any more"),
        (EtcdUnavailable("no etcd member answered"), ": no etcd member answered"),
        (KeyError("a bug"), ""),
    ],
)
def test_a_wish_that_fails_is_told(
    side: LoopThread, caplog: pytest.LogCaptureFixture, error: Exception, says: str
) -> None:
    def put_desired(wish: Wish) -> None:
        raise error

    Rescheduling(side.loop, no_move, put_desired, 1.0).wish(WISH)
    eventually(lambda: caplog.messages)
    assert caplog.messages == [f"epoch 17: the number of instances stays{says}"]
    _end_threads(side)


def _end_threads(side: LoopThread) -> None:
    """Those of the loop's pool, which a node ends with its loop."""
    ended = asyncio.run_coroutine_threadsafe(side.loop.shutdown_default_executor(), side.loop)
    ended.result(5.0)
