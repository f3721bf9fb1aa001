"""One request that is about to move, stopped at a step of its migration for a fault to happen."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from llumnix.control.keys import Keys
from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.instance import SimEngine
from tests.kit.invariants import check_invariants
from tests.kit.loop import soon
from tests.kit.mesh import SMALL, MeshNode, Stream
from tests.kit.migrating import BEFORE, TOKENS, Cluster, Control, Layout, Stop, cluster

NAME, OTHER = "r", "other"
OTHER_PROMPT = list(range(200, 240))


class Scene:
    """The request `r` at its source, its destination, and a third instance at its API server."""

    def __init__(self, cluster: Cluster, layout: Layout) -> None:
        self.cluster = cluster
        self.layout = layout
        self.source = self.destination = self.spare = ""
        self.stream = Stream()
        self._stop: Stop | None = None
        self._moving: asyncio.Task[str] | None = None

    @property
    def home(self) -> MeshNode:
        """The node of its API server."""
        return self.cluster.sites[self.layout.home].node

    async def begin(self, step: str) -> None:
        """Begin to move it, up to a step."""
        self._stop = self.cluster.stop(step)
        self._moving = self.cluster.move(NAME, self.source, self.destination)
        reached = asyncio.ensure_future(self._stop.reached.wait())
        await asyncio.wait([reached, self._moving], return_when=asyncio.FIRST_COMPLETED)
        if step == "resume":  # the destination's last step, when all is done at the source
            await self._moving
            await soon(lambda: self.cluster.where(NAME) == [self.destination])
        else:
            assert not self._moving.done(), f"before {step!r}: {self._moving.result()}"
        await reached

    def release(self) -> None:
        """Let the migration go on."""
        assert self._stop is not None
        self._stop.release()

    async def go_on(self) -> str:
        """Let the migration go on: `moved`, or why it was not."""
        self.release()
        return await self.outcome()

    async def outcome(self) -> str:
        """`moved`, or why it was not."""
        assert self._moving is not None
        return await asyncio.wait_for(self._moving, 60.0)

    async def let(self, tokens: int) -> None:
        """Have so many tokens come from the source."""
        wanted = len(self.stream.tokens) + tokens
        while (have := len(self.stream.tokens)) < wanted:
            self.cluster.paces[self.source].let(1)
            await soon(lambda have=have: len(self.stream.tokens) > have)

    async def cancel(self) -> None:
        """Its client goes away."""
        await self.home.client.abort_requests_async([NAME])

    async def is_at(self, *instances: str) -> None:
        """Wait until it runs at one of these, and nothing moves."""
        await check_invariants(self.cluster)
        (here,) = self.cluster.where(NAME)
        assert here in instances

    async def moves_again(self) -> None:
        """Whatever has happened, it can move as any other."""
        await check_invariants(self.cluster)
        for site in self.cluster.sites.values():  # and a stall of the machine does not matter
            limits = replace(site.migrations._departures._rules.limits, within=10.0)
            site.migrations._departures._rules = replace(
                site.migrations._departures._rules, limits=limits
            )
        (here,) = self.cluster.where(NAME)
        others = [i for i in (self.destination, self.spare, self.source) if i != here]
        near = [i for i in others if self.cluster.alive(i) and self._can_go(here, i)]
        there = near[0] if near else await self.cluster.host(self.layout.home)
        assert await self.cluster.move(NAME, here, there) == "moved"
        await soon(lambda: self.cluster.where(NAME) == [there])

    def _can_go(self, *instances: str) -> bool:
        nodes = {self.layout.home, *(self.cluster.node_of(i).name for i in instances)}
        return not any(pair <= nodes for pair in self.cluster.cut)

    async def ends_well(self) -> None:
        """It runs to its end, and its client gets every token."""
        self.cluster.open()
        await soon(lambda: self.stream.ended)
        assert self.stream.failure is None and self.stream.finish == "length"
        assert self.stream.tokens == self.cluster.answers[NAME]

    def deaths(self) -> int:
        """How many owners of it have died, as its API server counts."""
        entry = self.home.client.ledger.get(NAME)
        assert entry is not None
        return entry.deaths


@asynccontextmanager
async def scene(
    controls: dict[str, Control],
    keys: Keys,
    layout: Layout,
    *,
    source: ModelConfig = SMALL,
    destination: ModelConfig = SMALL,
    engine: type[SimEngine] = SimEngine,
    tokens: int = BEFORE,
    length: int = TOKENS,
    company: int = 0,
    **options: Any,
) -> AsyncIterator[Scene]:
    """The request has generated `tokens` of `length`; in the end the invariants hold.

    `company`: a request `other` for so many tokens is at the source before it.
    """
    async with cluster(controls, keys, **options) as whole:
        one = Scene(whole, layout)
        one.source = await whole.host(layout.source, source)
        one.destination = await whole.host(layout.destination, destination, engine)
        one.spare = await whole.host(layout.home)
        if company:
            await whole.ask(layout.home, OTHER, company, prompt=OTHER_PROMPT)
            await soon(lambda: whole.paces[one.source].waiting)
        one.stream = await whole.ask(layout.home, NAME, length)
        await soon(lambda: whole.where(NAME) and whole.paces[one.source].waiting)
        if tokens:
            await one.let(tokens)
        yield one
        whole.open()
        await check_invariants(whole)
