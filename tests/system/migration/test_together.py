"""Requests that wait move together, over real links: at once, and without a record in etcd."""

import asyncio
from typing import Any

import pytest

from llumnix.control.keys import Keys
from llumnix.engine.base import EngineError
from llumnix.migration.actor import MigrationActor
from llumnix.migration.errors import BLAMELESS, kind_of
from llumnix.migration.messages import MoveWaiting
from tests.kit.invariants import check_invariants
from tests.kit.loop import on_loop, soon
from tests.kit.migrating import Cluster, Control, cluster
from tests.kit.requests import answer

NAMES = ("one", "two", "three", "four")


async def crowd(whole: Cluster, home: str = "b") -> tuple[str, str, dict[str, Any]]:
    """Four requests that wait at an instance whose engine stands still, and an empty one."""
    source, destination = await whole.host("a"), await whole.host("b")
    streams = {}
    for n, name in enumerate(NAMES):
        prompt = list(range(100 + 50 * n, 140 + 50 * n))
        streams[name] = await whole.ask(home, name, 20, prompt=prompt)
        await soon(lambda name=name: whole.where(name) == [source])
    return source, destination, streams


def ask(
    whole: Cluster, source: str, destination: str, count: int, blocks: int, epoch: int = 0
) -> Any:
    step = MoveWaiting(destination, "balance", epoch, "queue", count, blocks)
    return whole.sites["b"].migrations.command("a", source, step)


@pytest.mark.parametrize("home", ["a", "b", "c"])
@on_loop
async def test_those_that_wait_go_at_once(
    controls: dict[str, Control], keys: Keys, home: str
) -> None:
    async with cluster(controls, keys) as whole:
        source, destination, streams = await crowd(whole, home)
        waiting = [t.request_id for t in whole.hosted(source).order.queue]
        report = await ask(whole, source, destination, 9, 19)
        going = [name for name in NAMES if name in waiting][:3]
        assert report.requests == len(going) and report.blocks == 3 * len(going)
        await soon(lambda: all(whole.where(n) == [destination] for n in going))
        assert whole.where(NAMES[-1]) == [source], (
            "three more leave each 3 blocks to grow there, four do not"
        )
        assert not whole.sites["a"].actor.ask(MigrationActor.under_way).get(timeout=5.0)
        whole.open()
        for n, name in enumerate(NAMES):
            await soon(lambda name=name: streams[name].ended)
            prompt = list(range(100 + 50 * n, 140 + 50 * n))
            assert streams[name].tokens == answer(prompt, 20), "every token, and once"
        await check_invariants(whole)


@on_loop
async def test_what_has_begun_is_left_where_it_is(controls: dict[str, Control], keys: Keys) -> None:
    async with cluster(controls, keys) as whole:
        source, destination, streams = await crowd(whole)
        whole.paces[source].open()
        await soon(lambda: all(streams[name].ended for name in NAMES))
        with pytest.raises(EngineError, match="would fit") as refused:
            await ask(whole, source, destination, 9, 99)
        assert kind_of(refused.value) in BLAMELESS


@on_loop
async def test_a_former_leader_moves_nothing(controls: dict[str, Control], keys: Keys) -> None:
    async with cluster(controls, keys) as whole:
        source, destination, _ = await crowd(whole)
        whole.leader_epoch = 7
        with pytest.raises(EngineError, match="epoch 6 is over") as refused:
            await ask(whole, source, destination, 9, 99, epoch=6)
        assert kind_of(refused.value) not in BLAMELESS
        assert all(whole.where(name) == [source] for name in NAMES)
        await asyncio.gather(ask(whole, source, destination, 9, 99, epoch=7))
        whole.open()
