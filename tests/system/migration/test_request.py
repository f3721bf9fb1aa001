"""What a request may do of itself while it moves: end, be cancelled, be preempted, not have begun.

Each at each step at which it can happen, wherever source, destination and API server are.
"""

from dataclasses import replace
from typing import Any

import pytest

from llumnix.control.keys import Keys
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import SMALL
from tests.kit.migrating import LAYOUTS, NEAR_AND_FAR, STEPS, TYPICAL, Control
from tests.kit.requests import answer
from tests.kit.scene import NAME, OTHER, scene

ENDED = f"request {NAME} has ended"
every_step = pytest.mark.parametrize("step", STEPS)
everywhere = pytest.mark.parametrize("where", LAYOUTS)


@everywhere
@on_loop
async def test_it_moves(controls: dict[str, Control], keys: Keys, where: str) -> None:
    """Nothing goes wrong: the yardstick for all that follows."""
    async with scene(controls, keys, LAYOUTS[where]) as s:
        gaps = s.home.gaps
        assert await s.cluster.move(NAME, s.source, s.destination) == "moved"
        await s.is_at(s.destination)
        await s.moves_again()
        await s.ends_well()
        assert len(gaps) == 2
        assert not s.home.client.ledger.dropped and s.home.decisions == 1


@every_step
@pytest.mark.parametrize("where", TYPICAL)
@on_loop
async def test_it_ends(controls: dict[str, Control], keys: Keys, where: str, step: str) -> None:
    async with scene(controls, keys, LAYOUTS[where]) as s:
        await s.begin(step)
        await s.ends_well()
        assert await s.go_on() == ("moved" if step == "resume" else ENDED)


@every_step
@everywhere
@on_loop
async def test_it_is_cancelled(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    """The cancellation reaches it wherever it is, and it does not go on elsewhere."""
    async with scene(controls, keys, LAYOUTS[where]) as s:
        await s.begin(step)
        await s.cancel()
        await soon(lambda: not s.cluster.where(NAME))
        assert await s.go_on() == ("moved" if step == "resume" else ENDED)
        have = len(s.stream.tokens)
        s.cluster.open()
        await soon(lambda: all(site.node.clean() for site in s.cluster.sites.values()))
        assert not s.stream.ended and len(s.stream.tokens) == have
        assert s.home.decisions == 1


@pytest.mark.parametrize("step", STEPS[STEPS.index("copy") : STEPS.index("resume")])
@pytest.mark.parametrize("where", NEAR_AND_FAR)
@on_loop
async def test_it_is_preempted(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    """It loses its KV blocks to another request, and moves all the same."""
    # Two requests of 40 tokens fill 8 blocks of 16 when they have generated 24 each.
    tight = replace(SMALL, total_blocks=8, max_model_len=128)
    crowd: Any = {"source": tight, "tokens": 0, "length": 60, "company": 80}
    async with scene(controls, keys, LAYOUTS[where], **crowd) as s:
        other = s.home.streams[OTHER]
        model, pace = s.cluster.engine(s.source).model, s.cluster.paces[s.source]
        pace.let(1)  # in which only the other one is computed
        await s.let(3)
        await s.begin(step)
        while not model.preemptions:
            have = len(other.tokens)
            pace.let(1)
            await soon(lambda have=have: len(other.tokens) > have)
        assert model.computed(NAME) == 0 and model.computed(OTHER)
        assert await s.go_on() == "moved", "as soon as the other one has ended"
        await s.is_at(s.destination)
        s.cluster.open()
        await soon(lambda: s.stream.ended and other.ended)
        assert s.stream.tokens == s.cluster.answers[NAME]
        assert other.tokens == s.cluster.answers[OTHER]


@everywhere
@on_loop
async def test_it_waits_still(controls: dict[str, Control], keys: Keys, where: str) -> None:
    """A request in the queue has no KV cache; it moves to where it can run."""
    one = replace(SMALL, max_num_seqs=1)
    async with scene(controls, keys, LAYOUTS[where], source=one) as s:
        queued = await s.cluster.ask(s.layout.home, "queued", 20, prompt=[7] * 40)
        await soon(lambda: s.cluster.engine(s.source).model.waiting)
        assert await s.cluster.move("queued", s.source, s.destination) == "moved"
        await soon(lambda: s.cluster.where("queued") == [s.destination])
        s.cluster.paces[s.destination].open()
        await soon(lambda: queued.ended)
        assert queued.tokens == answer([7] * 40, 20) and len(s.stream.tokens) == 5
        await s.ends_well()


SLOW = replace(SMALL, max_num_batched_tokens=20)  # two steps for the prompt


@everywhere
@on_loop
async def test_it_is_in_prefill(controls: dict[str, Control], keys: Keys, where: str) -> None:
    """What is computed of its prompt moves, and it begins at the destination."""
    async with scene(controls, keys, LAYOUTS[where], source=SLOW, tokens=0) as s:
        assert s.cluster.engine(s.source).model.computed(NAME) == 20
        await s.begin("resume")
        await soon(lambda: s.cluster.where(NAME) == [s.destination])
        assert not s.stream.tokens
        assert await s.go_on() == "moved"
        await s.is_at(s.destination)
        await s.moves_again()
        await s.ends_well()


@pytest.mark.parametrize("step", [s for s in STEPS if s not in ("stage 2", "resume")])
@on_loop
async def test_it_begins_on_the_way(controls: dict[str, Control], keys: Keys, step: str) -> None:
    """It is in prefill when it begins to move, and decodes when it is handed over."""
    layout = LAYOUTS["API server elsewhere"]
    async with scene(controls, keys, layout, source=SLOW, tokens=0) as s:
        await s.begin(step)
        s.cluster.paces[s.source].let(4)
        await soon(lambda: len(s.stream.tokens) == 3)
        assert await s.go_on() == "moved"
        await s.is_at(s.destination)
        await s.moves_again()
        await s.ends_well()
