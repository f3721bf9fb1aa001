"""Two nodes lose each other, for a moment or for good, at each step of a migration.

To all others a node that has died is one that can't be reached.
"""

import pytest

from llumnix.control.keys import Keys
from tests.kit.loop import on_loop, soon
from tests.kit.migrating import APART, LAYOUTS, STEPS, Control, before
from tests.kit.scene import NAME, scene

every_step = pytest.mark.parametrize("step", STEPS)
apart = pytest.mark.parametrize("where", APART)


@every_step
@apart
@on_loop
async def test_source_and_destination_lose_their_link(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    """They may connect again; a request whose API server is at the other end resumes meanwhile."""
    async with scene(controls, keys, APART[where]) as s:
        await s.begin(step)
        await s.cluster.lose_link("a", "b")
        await s.go_on()
        await s.is_at(s.source, s.destination, s.spare)
        await s.moves_again()
        await s.ends_well()


@every_step
@apart
@on_loop
async def test_source_and_destination_are_cut_off_from_each_other(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    async with scene(controls, keys, APART[where]) as s:
        await s.begin(step)
        await s.cluster.sever("a", "b")
        outcome = await s.go_on()
        if step in before("commit"):
            assert outcome != "moved"
        if s.layout.home == "c" and outcome != "moved":
            await s.is_at(s.source)
        await s.is_at(s.source, s.destination, s.spare)
        await s.ends_well()


@every_step
@pytest.mark.parametrize("end", ["source", "destination"])
@on_loop
async def test_the_api_server_is_cut_off_from_one_end(
    controls: dict[str, Control], keys: Keys, end: str, step: str
) -> None:
    """What this end has of the request is given up, as nobody could get its tokens."""
    async with scene(controls, keys, LAYOUTS["API server elsewhere"]) as s:
        await s.begin(step)
        lost = s.source if end == "source" else s.destination
        await s.cluster.sever("c", s.cluster.node_of(lost).name)
        await s.go_on()
        await s.is_at(*{s.source, s.destination, s.spare} - {lost})
        assert not s.cluster.hosted(lost).requests
        await s.ends_well()


@every_step
@pytest.mark.parametrize("end", ["source", "destination"])
@on_loop
async def test_the_node_of_one_end_is_gone(
    controls: dict[str, Control], keys: Keys, end: str, step: str
) -> None:
    async with scene(controls, keys, LAYOUTS["API server elsewhere"]) as s:
        await s.begin(step)
        lost = s.source if end == "source" else s.destination
        name = s.cluster.node_of(lost).name
        s.cluster.engine(lost).die(f"node {name} is gone")
        for other in {"a", "b", "c"} - {name}:
            await s.cluster.sever(name, other)
        await s.go_on()
        await s.is_at(*{s.source, s.destination, s.spare} - {lost})
        await s.moves_again()
        await s.ends_well()


@every_step
@apart
@on_loop
async def test_the_node_of_the_api_server_is_gone(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    """The request ends wherever it is: nobody is left who wants it."""
    async with scene(controls, keys, APART[where]) as s:
        await s.begin(step)
        others = {"a", "b", "c"} - {s.layout.home}
        s.home.client.ledger.close(NAME)
        for other in others:
            await s.cluster.sever(s.layout.home, other)
        for instance in (s.source, s.destination):
            if s.cluster.node_of(instance) is s.home:
                s.cluster.engine(instance).die("its node is gone")
        await soon(lambda: not s.cluster.where(NAME))
        await s.go_on()
