"""What a source lends stays held until the request computes elsewhere, and is what it had."""

from typing import Any

import pytest

from llumnix.control.keys import Keys
from llumnix.engine.base import EngineDead, EngineError, Transfer
from llumnix.migration import destination as at_destination
from llumnix.migration import source as at_source
from tests.kit.loop import on_loop, soon
from tests.kit.migrating import LAYOUTS, Control
from tests.kit.scene import NAME, Scene, scene

FAR = LAYOUTS["API server at the source"]


class Lending:
    """Stands before the blocks of a modelled engine, which lends none by itself."""

    def __init__(self, blocks: Any) -> None:
        self._blocks = blocks
        self.lent: list[str] = []
        self.expected: list[str] = []
        self.dropped: list[str] = []
        self.refusal: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blocks, name)

    def reads(self, pair: str) -> bool:
        return True

    def when_lent(self) -> None:
        """Called when something has been lent."""

    async def lend(self, migration: str, request_id: str) -> list[int]:
        self.lent.append(migration)
        self.when_lent()
        return [7]

    async def expect(
        self, migration: str, request_id: str, transfer: Transfer, theirs: list[int]
    ) -> None:
        assert request_id == NAME
        assert theirs == [7]
        self.expected.append(migration)
        if self.refusal is not None:
            raise self.refusal

    async def drop(self, migration: str) -> None:
        self.dropped.append(migration)
        await self._blocks.drop(migration)


def _lending(s: Scene) -> tuple[Lending, Lending]:
    both = []
    for instance in (s.source, s.destination):
        engine: Any = s.cluster.engine(instance)
        engine.blocks = Lending(engine.blocks)
        both.append(engine.blocks)
    return both[0], both[1]


@on_loop
async def test_it_is_held_until_the_request_computes_there(
    controls: dict[str, Control], keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_destination, "FIRST_OUTPUT", 5.0)
    async with scene(controls, keys, FAR) as s:
        source, destination = _lending(s)
        stop, moving = s.cluster.stop("resume"), s.cluster.move(NAME, s.source, s.destination)
        await stop.reached.wait()
        assert source.lent == destination.expected
        assert not source.dropped
        s.cluster.open()
        stop.release()
        assert await moving == "moved"
        assert source.dropped == source.lent
        await s.ends_well()


@on_loop
async def test_a_request_that_was_preempted_since_stays(
    controls: dict[str, Control], keys: Keys
) -> None:
    """It computes in another block now than in the one that was lent."""
    async with scene(controls, keys, FAR) as s:
        source, destination = _lending(s)
        held = s.cluster.hosted(s.source).find(NAME)
        assert held is not None

        def preempt() -> None:
            held.preemptions += 1

        source.when_lent = preempt  # type: ignore[method-assign]
        outcome = await s.cluster.move(NAME, s.source, s.destination)
        assert outcome == f"request {NAME} was preempted"
        await soon(lambda: source.dropped and destination.dropped)
        await s.is_at(s.source)
        await s.ends_well()


@pytest.mark.parametrize(
    ("refusal", "waits"), [(EngineError("no room"), False), (EngineDead("the link broke"), True)]
)
@on_loop
async def test_without_an_answer_it_may_be_taken_nevertheless(
    controls: dict[str, Control],
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Exception,
    waits: bool,
) -> None:
    """A refusal ends the loan; silence does not, so the blocks stay until the request computes."""
    monkeypatch.setattr(at_source, "LENT_SECONDS", 0.1)
    async with scene(controls, keys, LAYOUTS["all on one node"]) as s:
        source, destination = _lending(s)
        destination.refusal = refusal
        stop, moving = s.cluster.stop("resume"), s.cluster.move(NAME, s.source, s.destination)
        await stop.reached.wait()
        await soon(lambda: waits or source.dropped)
        assert bool(source.dropped) is not waits
        s.cluster.open()
        stop.release()
        assert await moving == "moved"
        await soon(lambda: source.dropped == source.lent)
        await s.ends_well()
