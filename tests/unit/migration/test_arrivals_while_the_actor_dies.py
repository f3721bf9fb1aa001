"""The arrivals of a node and its migration actor, when that has ended before them."""

import asyncio
from typing import Any

import pytest

from llumnix.actors.actor_supervision import Supervised
from llumnix.actors.base import Handle
from llumnix.engine.base import EngineError
from llumnix.migration import actor as module
from llumnix.migration.actor import MigrationActor, accept_arrival, end_arrival
from tests.kit.loop import on_loop

NO_ETCD: Any = None


@pytest.fixture
def dead() -> Handle[MigrationActor]:
    """An actor that has stopped."""
    actor = Handle(MigrationActor.start(NO_ETCD, 1, 0))
    actor.stop(5.0)
    return actor


@on_loop
async def test_nothing_is_accepted(dead: Handle[MigrationActor]) -> None:
    with pytest.raises(EngineError, match="this node stops"):
        await accept_arrival(dead, "m", "r", "a-0", 1)


@on_loop
async def test_an_end_that_nobody_writes_down_is_an_end(
    dead: Handle[MigrationActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    await end_arrival(dead, "m")


@on_loop
async def test_an_end_is_told_to_a_successor() -> None:
    told: list[str] = []

    class Books(MigrationActor):
        def departed(self, migration: str) -> None:
            told.append(migration)

    books: Supervised[MigrationActor] = Supervised(lambda: Books.start(NO_ETCD, 1, 0))
    books.stop(5.0)
    telling = asyncio.ensure_future(end_arrival(books, "m"))
    await asyncio.sleep(0)
    books.start_again()
    await telling
    assert told == ["m"]
    books.stop(5.0)
