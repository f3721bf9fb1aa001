"""Instances meet ahead of the first move: once, by the best way that works, and again anew."""

from typing import Any

import pytest

from llumnix.control.keys import Keys
from llumnix.engine.base import EngineError, SetupFailed, Transfer
from llumnix.migration import source as at_source
from llumnix.migration import transfer_groups as module
from tests.kit.loop import on_loop, soon
from tests.kit.migrating import LAYOUTS, Control
from tests.kit.scene import NAME, Scene, scene

FAR = LAYOUTS["API server at the source"]


class Ways:
    """Stands before the blocks of an engine: says which ways can be set up."""

    def __init__(self, blocks: Any, works: int, ways: int = 3) -> None:
        self._blocks = blocks
        self._works = works  # index of the first way that can be set up; `ways`: none
        self.ways = ways
        self.met: list[Transfer] = []
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blocks, name)

    async def meet(self, transfer: Transfer, sends: bool) -> None:
        self.met.append(transfer)
        if transfer.skips < self._works:
            raise SetupFailed("no way here")

    async def send(self, migration: str, transfer: Transfer) -> int:
        self.sent += 1
        return int(await self._blocks.send(migration, transfer))


def _between(s: Scene, works: int) -> tuple[Ways, Ways]:
    both = []
    for instance in (s.source, s.destination):
        engine: Any = s.cluster.engine(instance)
        engine.blocks = Ways(engine.blocks, works)
        both.append(engine.blocks)
    return both[0], both[1]


@on_loop
async def test_they_meet_once_by_the_first_way_that_works(
    controls: dict[str, Control], keys: Keys
) -> None:
    async with scene(controls, keys, FAR) as s:
        source, destination = _between(s, works=1)
        node = s.cluster.sites["a"].migrations
        node.look()
        await soon(lambda: len([t for t in source.met if t.pair.endswith(s.destination)]) == 2)
        ours = [t for t in source.met if t.pair.endswith(s.destination)]
        assert [t.skips for t in ours] == [0, 1]
        await soon(lambda: [t for t in destination.met if t.pair == ours[0].pair] == ours)
        back = f"{s.spare}--{s.source}"  # the next pair, of which the source hears as well
        await soon(lambda: [t for t in source.met if t.pair == back])
        met = len(source.met)
        node.look()
        node.look()
        assert await s.cluster.move(NAME, s.source, s.destination) == "moved"
        assert len(source.met) == met
        await s.ends_well()


@on_loop
async def test_a_pair_without_any_way_moves_by_computing_anew(
    controls: dict[str, Control], keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known once: nothing is sent, and a request that would be dear stays."""
    async with scene(controls, keys, FAR) as s:
        source, _ = _between(s, works=3)
        s.cluster.sites["a"].migrations.look()
        pair = f"{s.source}--{s.destination}"
        await soon(lambda: len([t for t in source.met if t.pair == pair]) == 3)
        monkeypatch.setattr(at_source, "RECOMPUTED_MOST", 10)
        outcome = await s.cluster.move(NAME, s.source, s.destination)
        assert "there is no way for KV blocks" in outcome
        monkeypatch.setattr(at_source, "RECOMPUTED_MOST", 10_000)
        assert await s.cluster.move(NAME, s.source, s.destination) == "moved"
        assert source.sent == 0
        assert len([t for t in source.met if t.pair == pair]) == 3
        await s.is_at(s.destination)
        await s.ends_well()


@on_loop
async def test_what_fails_otherwise_is_tried_a_few_times(
    controls: dict[str, Control], keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    async with scene(controls, keys, FAR) as s:
        source, _ = _between(s, works=0)
        tries: list[str] = []

        async def fail(transfer: Transfer, sends: bool) -> None:
            tries.append(transfer.pair)
            raise EngineError("it is busy")

        source.meet = fail  # type: ignore[method-assign]
        s.cluster.sites["a"].migrations.look()
        pair = f"{s.source}--{s.destination}"
        await soon(lambda: tries.count(pair) == module.TRIES)
        await s.ends_well()
        assert tries.count(pair) == module.TRIES
