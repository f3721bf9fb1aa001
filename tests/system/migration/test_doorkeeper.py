"""The arrivals of a node and its migration actor, when that has ended before them."""

import asyncio
from typing import Any

import pytest
from pykka import ThreadingActor

from llumnix.actors.supervised import Supervised
from llumnix.engine.base import EngineError
from llumnix.migration import permits
from llumnix.migration.permits import Doorkeeper
from tests.kit.loop import on_loop


@pytest.fixture
def dead() -> Any:
    """The proxy of an actor that has stopped."""

    class Books(ThreadingActor):
        def accept(self, *arguments: object) -> None: ...
        def departed(self, migration: str) -> None: ...

    ref = Books.start()
    proxy = ref.proxy()
    ref.stop()
    return proxy


@on_loop
async def test_nothing_is_accepted(dead: Any) -> None:
    with pytest.raises(EngineError, match="this node stops"):
        await Doorkeeper(dead).accept("m", "r", "a-0", 1)


@on_loop
async def test_an_end_that_nobody_writes_down_is_an_end(
    dead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permits, "PAUSE", 0.01)
    await Doorkeeper(dead).departed("m")


@on_loop
async def test_an_end_is_told_to_a_successor() -> None:
    told: list[str] = []

    class Books(ThreadingActor):
        def departed(self, migration: str) -> None:
            told.append(migration)

    books = Supervised(Books.start)
    books.stop(5.0)
    telling = asyncio.ensure_future(Doorkeeper(books).departed("m"))
    await asyncio.sleep(0)
    books.start_again()
    await telling
    assert told == ["m"]
    books.stop(5.0)
