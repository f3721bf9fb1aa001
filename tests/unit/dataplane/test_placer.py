"""A request goes on at another engine: each token reaches its client once, whoever died or refused.

The end of `mesh()` checks each time that no ledger, engine or task holds anything any more.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from vllm import PoolingParams
from vllm.v1.engine import EngineCoreRequest

from llumnix.dataplane.frames import HandOver, Lost
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import TRIAL_TOKENS, why_pinned
from llumnix.dataplane.ledger import Acceptance
from llumnix.dataplane.placer import NoInstance, Route
from llumnix.dataplane.suspects import DEATHS
from llumnix.engine.base import EngineError
from llumnix.engine.sim.instance import SimEngine
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import SMALL, Gate, MeshNode, Stream, mesh
from tests.kit.requests import answer, core_request

PROMPT, TOKENS = [11, 12, 13], 40


class Places:
    """Instances at two nodes, each stepping when it is told to; requests come from the first."""

    def __init__(self, home: MeshNode, away: MeshNode) -> None:
        self.home, self.away = home, away
        self.gates: dict[str, Gate] = {}
        self.order: list[str] = []
        home.dispatch = self._first_left

    async def host(self, number: int) -> None:
        for n in range(number):
            gate = Gate()
            instance = await (self.away, self.home)[n % 2].host(clock=gate.clock())
            self.gates[instance] = gate
            self.order.append(instance)

    async def _first_left(self, tokens: int, priority: int, avoid: frozenset[str]) -> Route:
        left = [i for i in self.order if i not in avoid]
        if not left:
            raise NoInstance("no instance is ready")
        return self.home.route(left[0])

    def hosts(self, instance: str) -> HostedInstance:
        return (self.home if instance in self.home.hosted else self.away).hosted[instance]

    def engine(self, instance: str) -> SimEngine:
        return (self.home if instance in self.home.hosted else self.away).engine(instance)

    async def let(self, instance: str, stream: Stream, steps: int) -> None:
        """Have so many tokens come from there."""
        have = len(stream.tokens)
        self.gates[instance].let(steps)
        await soon(lambda: len(stream.tokens) == have + steps)

    def open(self) -> None:
        for gate in self.gates.values():
            gate.open()


async def _ended(places: Places, stream: Stream, prompt: Sequence[int] = PROMPT) -> None:
    places.open()
    await soon(lambda: stream.ended)
    assert stream.failure is None and stream.tokens == answer(prompt, TOKENS)


@pytest.mark.parametrize("how", ["dies", "link"])
@pytest.mark.parametrize("deaths", range(1, DEATHS + 1))
def test_a_stream_survives_deaths_at_any_token(deaths: int, how: str) -> None:
    @on_loop
    async def check() -> None:
        async with mesh("a", "b") as (a, b):
            places = Places(a, b)
            await places.host(deaths + 1)
            stream = await a.ask("r1", PROMPT, TOKENS, priority=-5)
            for n in range(deaths):
                instance = places.order[n]
                await places.let(instance, stream, 7 + n)
                if how == "link" and instance in b.hosted:
                    for link in list(b.peers._running):
                        await link.close()
                else:
                    places.engine(instance).die(f"instance {instance} died: killed")
            last = places.order[deaths]
            await soon(lambda: places.gates[last].waiting)
            hosted = (a if last in a.hosted else b).hosted[last]
            assert [held.priority for held in hosted.requests] == [-5]
            await _ended(places, stream)

    check()


@on_loop
async def test_one_death_more_is_an_error_with_its_reason() -> None:
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(DEATHS + 2)
        stream = await a.ask("r1", PROMPT, TOKENS)
        for n in range(DEATHS + 1):
            instance = places.order[n]
            await places.let(instance, stream, TRIAL_TOKENS - 1)
            places.engine(instance).die(f"instance {instance} died: killed")
        await soon(lambda: stream.ended)
        last = f"instance {places.order[DEATHS]} died: killed"
        reason = f"request r1 is given up, as {DEATHS + 1} engines died while they ran it: {last}"
        assert stream.failure == reason
        assert stream.tokens == answer(PROMPT, (TRIAL_TOKENS - 1) * (DEATHS + 1))
        places.open()


@on_loop
async def test_a_request_lost_before_any_token_begins_elsewhere() -> None:
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(2)
        first, second = places.order
        stream = await a.ask("r1", PROMPT, TOKENS)
        await soon(lambda: places.gates[first].waiting)
        places.engine(first).die("instance b-0 died: killed")
        await soon(lambda: a.hosted[second].requests)
        (held,) = a.hosted[second].requests
        assert (held.epoch, held.position) == (3, 0)
        await _ended(places, stream)


@on_loop
async def test_a_stale_owners_outputs_are_dropped() -> None:
    """It is believed lost, and computes on."""
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(2)
        first, second = places.order
        stream = await a.ask("r1", PROMPT, TOKENS)
        await places.let(first, stream, 5)
        a.client.deliver(Lost(first, [1], ["r1"], "it was cut off", died=True))
        await soon(lambda: a.hosted[second].requests)
        places.gates[first].let(1)
        await soon(lambda: a.client.ledger.dropped[Acceptance.STALE] == 1)
        assert stream.tokens == answer(PROMPT, 5)
        await soon(lambda: not b.hosted[first].requests)  # the orphan is ended where it runs
        await _ended(places, stream)
        assert a.client.ledger.dropped.total() == 1


@on_loop
async def test_a_resume_computes_its_prompt_and_what_was_generated() -> None:
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(2)
        first, second = places.order
        stream = await a.ask("r1", [7] * 50, TOKENS)
        await places.let(first, stream, 20)
        places.engine(first).die("instance b-0 died: killed")
        await soon(lambda: places.gates[second].waiting)
        (blocks,) = places.engine(second).model.held().values()
        assert blocks == 5, "70 tokens"
        await _ended(places, stream, [7] * 50)


@on_loop
async def test_a_resumed_request_can_be_cancelled() -> None:
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(2)
        first, second = places.order
        stream = await a.ask("r1", PROMPT, TOKENS)
        await places.let(first, stream, 5)
        places.engine(first).die("instance b-0 died: killed")
        await soon(lambda: places.gates[second].waiting)
        await a.client.abort_requests_async(["r1"])
        assert not places.engine(second).model.has_work
        places.open()
        await soon(a.clean)
        assert stream.tokens == answer(PROMPT, 5)


# ---- requests that can't go on elsewhere ----


def _streaming(name: str) -> EngineCoreRequest:
    request = core_request(name, PROMPT, TOKENS)
    request.resumable = True
    return request


@on_loop
async def test_a_pinned_request_ends_with_an_error_that_says_why() -> None:
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(2)
        first, _ = places.order
        stream = a.streams["r1"] = Stream()
        await a.client.add_request_async(_streaming("r1"))
        await places.let(first, stream, 2)
        places.engine(first).die("instance b-0 died: killed")
        await soon(lambda: stream.ended)
        assert stream.failure == (
            "instance b-0 died: killed; the request can't go on elsewhere: "
            "its input is still being streamed"
        )
        assert stream.tokens == answer(PROMPT, 2)


@on_loop
async def test_a_pinned_request_that_has_not_begun_starts_over() -> None:
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(2)
        first, _ = places.order
        stream = a.streams["r1"] = Stream()
        await a.client.add_request_async(_streaming("r1"))
        await soon(lambda: places.gates[first].waiting)
        places.engine(first).die("instance b-0 died: killed")
        await _ended(places, stream)


def test_what_is_pinned() -> None:
    assert why_pinned(core_request("r", PROMPT)) is None
    pooling = core_request("r", PROMPT)
    pooling.sampling_params, pooling.pooling_params = None, PoolingParams()
    assert why_pinned(pooling) == "a pooling request has no tokens to go on from"
    embedded = core_request("r", PROMPT)
    embedded.prompt_token_ids = None
    assert why_pinned(embedded) == "its prompt has no token ids"


# ---- handed over, and refused there ----


class Refusing(SimEngine):
    """Takes no request that has tokens already."""

    async def add(self, request: EngineCoreRequest, generated: Sequence[int] = ()) -> None:
        raise EngineError("not today")


async def _handed(a: MeshNode, b: MeshNode, places: Places, destination: str) -> Stream:
    """A request of a's that its instance at b has just handed over, behind five tokens."""
    source = places.order[0]
    stream = await a.ask("r1", PROMPT, TOKENS, priority=-5)
    await places.let(source, stream, 5)
    held = b.hosted[source].find("r1")
    assert held is not None
    node = a._mesh.instances[destination]
    assert await b.hosted[source].hand_over([held], destination, node)
    assert not places.engine(source).model.has_work
    return stream


def _deaths(node: MeshNode) -> int:
    entry = node.client.ledger.get("r1")
    assert entry is not None
    return entry.deaths


@on_loop
async def test_a_hand_over() -> None:
    async with mesh("a", "b", "c") as (a, b, c):
        places = Places(a, b)
        await places.host(1)
        gate = Gate()
        there = await c.host(clock=gate.clock())
        gaps = a.gaps
        stream = await _handed(a, b, places, there)
        await soon(lambda: gate.waiting)
        (held,) = c.hosted[there].requests
        assert (held.request_id, held.epoch, held.position) == ("r1", 2, 5)
        assert held.priority == -5
        assert not gaps
        gate.open()
        await _ended(places, stream)
        assert len(gaps) == 1 and gaps[0] > 0
        assert not a.client.ledger.dropped and a.decisions == 1


@pytest.mark.parametrize("why", ["refuses", "is dead", "is gone", "node"])
def test_a_destination_that_does_not_take_it(why: str) -> None:
    """It goes on elsewhere, here where it was; and it has met no death."""

    @on_loop
    async def check() -> None:
        async with mesh("a", "b", "c") as (a, b, c):
            places = Places(a, b)
            await places.host(1)
            there = await c.host(engine=Refusing("c-0", SMALL))
            if why == "is dead":
                c.engine(there).die("instance c-0 died: killed")
            elif why == "is gone":
                hosted = c.hosted.pop(there)
            elif why == "node":
                del a._mesh.addresses["c"]
            stream = await _handed(a, b, places, there)
            source = places.order[0]
            await soon(lambda: b.hosted[source].requests)
            assert _deaths(a) == 0
            await _ended(places, stream)
            if why == "is gone":
                c.hosted[there] = hosted

    check()


@on_loop
async def test_a_waiting_request_that_is_refused_where_it_moves_goes_back() -> None:
    async with mesh("a", "b", "c") as (a, b, c):
        places = Places(a, b)
        await places.host(1)
        source = places.order[0]
        there = await c.host(engine=Refusing("c-0", SMALL))
        gaps = a.gaps
        stream = await a.ask("r1", PROMPT, TOKENS)
        await soon(lambda: places.gates[source].waiting)
        held = b.hosted[source].find("r1")
        assert held is not None
        await b.hosted[source].hand_over([held], there, "c")
        await soon(lambda: b.hosted[source].requests)
        assert _deaths(a) == 0
        await _ended(places, stream)
        assert not gaps, "no token stood before the gap"


@on_loop
async def test_a_death_behind_a_hand_over_counts_once_it_has_begun() -> None:
    async with mesh("a", "b", "c") as (a, b, c):
        places = Places(a, b)
        await places.host(2)
        gate = Gate()
        there = await c.host(clock=gate.clock())
        stream = await _handed(a, b, places, there)
        gate.let(1)
        await soon(lambda: len(stream.tokens) == 6)
        c.engine(there).die("instance c-0 died: killed")
        await soon(lambda: b.hosted[places.order[0]].requests)
        assert _deaths(a) == 1
        await _ended(places, stream)


@on_loop
async def test_a_cancellation_that_crosses_a_hand_over() -> None:
    """It goes to the old owner, which has the request no more; nobody takes it up again."""
    async with mesh("a", "b", "c") as (a, b, c):
        places = Places(a, b)
        await places.host(1)
        there = await c.host()
        coming = c.hosted[there].expect("r1")
        frozen, reached = asyncio.Event(), asyncio.Event()

        class Slow:
            opened, closed = a.exchange.opened, a.exchange.closed

            async def take(self, link: Any, frame: Any) -> None:
                if isinstance(frame, HandOver):
                    reached.set()
                    await frozen.wait()
                await a.exchange.take(link, frame)

        a.peers.bind(Slow())
        stream = await a.ask("r1", PROMPT, TOKENS)
        source = places.order[0]
        await places.let(source, stream, 5)
        held = b.hosted[source].find("r1")
        assert held is not None
        await b.hosted[source].hand_over([held], there, "c")
        await reached.wait()
        await a.client.abort_requests_async(["r1"])
        frozen.set()
        assert await asyncio.wait_for(coming, 2.0) is None, "the destination waits no longer"
        assert a.client.ledger.dropped[Acceptance.STALE] == 1
        assert not b.hosted[source].requests and not c.hosted[there].requests
        assert stream.tokens == answer(PROMPT, 5)


@on_loop
async def test_a_cancellation_at_the_very_moment_of_a_hand_over() -> None:
    """Behind the frame and before the request is on its way."""
    async with mesh("a", "b", "c") as (a, b, c):
        places = Places(a, b)
        await places.host(1)
        there = await c.host()
        stream = await a.ask("r1", PROMPT, TOKENS)
        source = places.order[0]
        await places.let(source, stream, 5)
        a.client.deliver(HandOver(source, 1, "r1", there, "c"))
        await a.client.abort_requests_async(["r1"])
        await soon(lambda: not a.client._tasks)
        await b.hosted[source].cancel(["r1"])  # which a real source would have done before
        await soon(lambda: a.clean() and c.clean())
        assert stream.tokens == answer(PROMPT, 5)
        places.open()


@on_loop
async def test_a_request_that_kills_engines_takes_nobody_along() -> None:
    """All that died with it twice are tried one at a time, and it alone dies a third time."""
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(5)
        poison = await a.ask("poison", PROMPT, TOKENS)
        others = [await a.ask(f"r{n}", [*PROMPT, n], TOKENS) for n in range(4)]
        killed = set()

        while not poison.ended:
            here = _owner(a, "poison")
            running = here is not None and places.hosts(here).find("poison") is not None
            if here is not None and running and places.gates[here].waiting:
                killed.add(here)
                places.engine(here).die(f"instance {here} died: killed")
            else:
                for instance, gate in places.gates.items():
                    if instance != here and gate.waiting:  # it gets no token, which would clear it
                        gate.let(1)
            await asyncio.sleep(0.005)
        assert len(killed) == DEATHS + 1
        assert poison.failure is not None and "request poison is given up" in poison.failure
        for n, stream in enumerate(others):
            await _ended(places, stream, [*PROMPT, n])


@on_loop
async def test_a_request_that_raises_an_exception_ends_two_engines() -> None:
    """All that began in the step with it are tried one at a time, and it alone fails again."""
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(4)
        first = places.order[0]
        before = await a.ask("before", [9], TOKENS)
        await soon(lambda: places.gates[first].waiting)
        poison = await a.ask("poison", PROMPT, TOKENS)
        others = [await a.ask(f"r{n}", [*PROMPT, n], TOKENS) for n in range(3)]
        await soon(lambda: len(places.hosts(first).requests) == 5)
        await places.let(first, before, 1)
        await soon(lambda: len(places.engine(first).model.held()) == 5)
        killed = []
        while not poison.ended:
            here = _owner(a, "poison")
            if here is not None and any(
                name.startswith("poison") for name in places.engine(here).model.held()
            ):
                killed.append(here)
                places.engine(here).die(f"instance {here} died: poison", "RuntimeError")
            else:
                for gate in places.gates.values():
                    if gate.waiting:
                        gate.let(1)
            await asyncio.sleep(0.005)
        assert killed[0] == first and len(killed) == 2
        assert poison.failure is not None and "as 2 engines died" in poison.failure
        for prompt, stream in [([9], before), *(([*PROMPT, n], s) for n, s in enumerate(others))]:
            await _ended(places, stream, prompt)


@on_loop
async def test_a_suspect_that_goes_while_it_waits_for_its_trial_leaves_nothing() -> None:
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        await places.host(4)
        streams = {name: await a.ask(name, PROMPT, TOKENS) for name in ("first", "second")}
        for _ in range(DEATHS):
            await soon(lambda: all(_runs(a, places, name) for name in streams))
            here = places.order.pop(0)
            await soon(lambda here=here: places.gates[here].waiting)
            places.engine(here).die(f"instance {here} died: killed")
        await soon(lambda: any(_runs(a, places, name) for name in streams))
        tried, waits = sorted(streams, key=lambda name: not _runs(a, places, name))
        assert not _runs(a, places, waits), "one is tried alone"
        await a.client.abort_requests_async([waits])
        await _ended(places, streams[tried])
        await soon(lambda: not a.client.placer._trials.locked())
        assert not a.client.interruptions.any


def _owner(a: MeshNode, name: str) -> str | None:
    entry = a.client.ledger.get(name)
    return entry.owner if entry is not None else None


def _runs(a: MeshNode, places: Places, name: str) -> bool:
    owner = _owner(a, name)
    return owner is not None and places.hosts(owner).find(name) is not None


async def _loses_the_only_one(a: MeshNode, places: Places) -> tuple[Stream, str]:
    """A request that has five tokens when its instance dies, which was the only one; and why."""
    await places.host(1)
    (first,) = places.order
    stream = await a.ask("r1", PROMPT, TOKENS)
    await places.let(first, stream, 5)
    reason = f"instance {first} died: killed"
    places.engine(first).die(reason)
    places.order.remove(first)
    return stream, reason


@on_loop
async def test_a_request_waits_for_an_instance_to_come() -> None:
    """None is left when its own dies; it goes on as soon as there is another."""
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        stream, _ = await _loses_the_only_one(a, places)
        await soon(lambda: a.decisions > 1)  # it has looked in vain
        assert not stream.ended
        await places.host(1)
        a.client.placer.instances_changed()
        await _ended(places, stream)


@on_loop
async def test_it_does_not_wait_for_ever() -> None:
    async with mesh("a", "b") as (a, b):
        places = Places(a, b)
        stream, reason = await _loses_the_only_one(a, places)
        await soon(lambda: stream.ended)
        wait = "no instance was ready within 2 s (--failover-timeout)"
        assert stream.failure == f"{wait}; {reason}"
        assert stream.tokens == answer(PROMPT, 5)
        places.open()
