"""Requests, moves and faults at random, all from one seed."""

import asyncio
import random
import re

from tests.kit.invariants import check_invariants
from tests.kit.loop import soon
from tests.kit.mesh import Stream
from tests.kit.migrating import STEPS, Cluster, Stop

# Why a request may fail: those that were running it have died too often, or it had nowhere to go.
CAUSE = re.compile(
    r"instance \S+ died: killed|lost the connection to node \S|no instance (is|was) ready"
)
OPEN = 14  # requests at a time
BREATH = 0.001  # seconds after each thing: etcd answers in real time, and a move asks it often
DEATHS = 3  # engines that are killed


class Chaos:
    """Does one random thing after the other to a cluster."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.random = random.Random(seed)
        self.streams: dict[str, Stream] = {}
        self.homes: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.moves: list[asyncio.Task[str]] = []
        self.stopped: list[Stop] = []
        self.deaths = 0
        self.log: list[str] = []
        self._things = {
            self.ask: 6,
            self.let: 20,
            self.move: 12,
            self.stop: 4,
            self.release: 5,
            self.cancel: 1,
            self.kill: 0.4,
            self.unlink: 0.4,
        }

    async def run(self, things: int) -> None:
        """Do so many things, and see how it all ends."""
        self.cluster.close()
        weights = list(self._things.values())
        for thing in self.random.choices(list(self._things), weights, k=things):
            await thing()
            for _ in range(self.random.randrange(12)):
                await asyncio.sleep(0)
            await asyncio.sleep(BREATH)
        for stop in self.stopped:
            stop.release()
        self.cluster.stops.clear()
        self.cluster.open()
        await asyncio.gather(*self.moves)
        await soon(lambda: all(s.ended for n, s in self.streams.items() if n not in self.cancelled))
        await check_invariants(self.cluster)

    def wrong(self) -> list[str]:
        """What a client got that it should not have got."""
        found = []
        for name, stream in self.streams.items():
            right = self.cluster.answers[name]
            if stream.failure is not None and not CAUSE.search(stream.failure):
                found.append(f"{name} failed: {stream.failure}")
            elif stream.finish is not None and stream.tokens != right:
                found.append(f"{name} ended with {len(stream.tokens)} tokens of {len(right)}")
            elif stream.tokens != right[: len(stream.tokens)]:
                found.append(f"{name} has wrong tokens")
        return found

    def outcomes(self) -> list[str]:
        """What became of each move."""
        return [move.result() for move in self.moves]

    # ---- what may happen ----

    async def ask(self) -> None:
        going = [n for n, s in self.streams.items() if not s.ended and n not in self.cancelled]
        if len(going) >= OPEN:
            return
        name = f"r{len(self.streams)}"
        home = self.random.choice(list(self.cluster.sites))
        prompt = [self.random.randrange(3, 30_000) for _ in range(self.random.randrange(1, 90))]
        self.homes[name] = home
        self.random.shuffle(self.cluster.order)
        self.streams[name] = await self.cluster.ask(
            home, name, self.random.randrange(1, 100), prompt=prompt
        )

    async def let(self) -> None:
        self.cluster.paces[self.random.choice(self.cluster.order)].let(self.random.randrange(8))

    async def move(self) -> None:
        running = [n for n in self.streams if self.cluster.where(n)]
        if running:
            name = self.random.choice(running)
            here, there = self.cluster.where(name)[0], self.random.choice(self.cluster.order)
            asks = self.random.choice(list(self.cluster.sites))
            self.moves.append(self.cluster.move(name, here, there, asks))

    async def stop(self) -> None:
        self.stopped.append(self.cluster.stop(self.random.choice(STEPS)))

    async def release(self) -> None:
        if self.stopped:
            self.stopped.pop(self.random.randrange(len(self.stopped))).release()

    async def cancel(self) -> None:
        going = [n for n, s in self.streams.items() if not s.ended and n not in self.cancelled]
        if going:
            name = self.random.choice(going)
            self.cancelled.add(name)
            await self.cluster.sites[self.homes[name]].node.client.abort_requests_async([name])

    async def kill(self) -> None:
        instance = self.random.choice(self.cluster.order)
        if self.deaths < DEATHS and self.cluster.alive(instance):
            self.deaths += 1
            self.cluster.engine(instance).die(f"instance {instance} died: killed")
            await self.cluster.host(self.cluster.node_of(instance).name)

    async def unlink(self) -> None:
        one, other = self.random.sample(list(self.cluster.sites), 2)
        await self.cluster.lose_link(one, other)
