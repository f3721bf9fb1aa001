"""A node stops while requests move from it or to it: migrations end, then its engines."""

import pytest

from llumnix.control.keys import Keys
from tests.kit.loop import on_loop
from tests.kit.migrating import LAYOUTS, NEAR_AND_FAR, STEPS, Control, before
from tests.kit.scene import NAME, Scene, scene

every_step = pytest.mark.parametrize("step", STEPS)
STOPPING = [("API server elsewhere", "a"), ("API server elsewhere", "b"), ("both elsewhere", "a")]


async def _stop(s: Scene, name: str) -> None:
    """As a node does that has waited long enough for its requests to end."""
    site = s.cluster.sites[name]
    await site.migrations.close()
    for hosted in site.node.hosted.values():
        await hosted.stop(1.0)


@every_step
@pytest.mark.parametrize("where, stops", STOPPING)
@on_loop
async def test_a_node_stops(
    controls: dict[str, Control], keys: Keys, where: str, stops: str, step: str
) -> None:
    """What it runs goes on elsewhere; whoever wanted the move hears why there is none."""
    async with scene(controls, keys, LAYOUTS[where]) as s:
        await s.begin(step)
        await _stop(s, stops)
        outcome = await s.go_on()
        if s.layout.source == stops:
            assert outcome == ("moved" if step == "resume" else "node a stops")
        elif step in before("commit"):
            assert outcome != "moved"
        await s.is_at(*(i for i in s.cluster.order if s.cluster.node_of(i).name != stops))
        assert s.deaths() <= 1
        await s.moves_again()
        await s.ends_well()


@pytest.mark.parametrize("step", before("resume"))
@pytest.mark.parametrize("where", NEAR_AND_FAR)
@on_loop
async def test_migrations_end_before_the_engines(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    """The request runs on where it is, as nothing has happened to it."""
    async with scene(controls, keys, LAYOUTS[where]) as s:
        await s.begin(step)
        await s.cluster.sites[s.layout.source].migrations.close()
        assert await s.go_on() == "node a stops"
        await s.is_at(s.source)
        assert not s.deaths()
        await s.ends_well()


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("side", ["source", "destination"])
@on_loop
async def test_nothing_begins_at_a_node_that_stops(
    controls: dict[str, Control], keys: Keys, where: str, side: str
) -> None:
    async with scene(controls, keys, LAYOUTS[where]) as s:
        name = s.layout.source if side == "source" else s.layout.destination
        await s.cluster.sites[name].migrations.close()
        assert await s.cluster.move(NAME, s.source, s.destination) == f"node {name} stops"
        await s.is_at(s.source)
        await s.ends_well()
