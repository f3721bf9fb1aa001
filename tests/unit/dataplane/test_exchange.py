"""Requests at one node and their instances at another: what is delivered, and what is left.

The end of `mesh()` checks each time that no ledger, engine or task holds anything any more, and
`on_loop` that no task or descriptor is left.
"""

import asyncio
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from llumnix.dataplane import utility_calls
from llumnix.dataplane.frames import Lost, Outputs
from llumnix.dataplane.ledger import Acceptance
from llumnix.dataplane.placer import Route
from llumnix.dataplane.utility_calls import BLOCKS_HELD
from llumnix.engine.base import EngineError
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import Gate, MeshNode, mesh
from tests.kit.requests import answer, core_request

PROMPT = [11, 12, 13]


@on_loop
async def test_near_and_far_give_the_same_tokens() -> None:
    async with mesh("a", "b") as (a, b):
        await b.host()
        near = await b.answered("near", PROMPT, 40)
        far = await a.answered("far", PROMPT, 40)
        assert near == far == answer(PROMPT, 40)


@on_loop
async def test_many_at_once_from_both_sides() -> None:
    async with mesh("a", "b") as (a, b):
        targets = [await a.host(), await b.host()]
        streams = []
        for n in range(60):
            node = (a, b)[n % 2]
            node.target = targets[n // 2 % 2]
            streams.append(await node.ask(f"r{n}", [n, n + 1], 20))
        await soon(lambda: all(s.ended for s in streams), within=10)
        for n, stream in enumerate(streams):
            assert stream.tokens == answer([n, n + 1], 20)
        assert not a.client.ledger.dropped and not b.client.ledger.dropped
        assert a.peers.open >= 1


@on_loop
async def test_an_id_that_is_open_is_refused() -> None:
    async with mesh("a") as (a,):
        gate = Gate()
        await a.host(clock=gate.clock())
        await a.ask("r1", PROMPT)
        with pytest.raises(ValueError, match="r1"):
            await a.client.add_request_async(core_request("r1", PROMPT))
        gate.open()


# ---- cancellation ----


@pytest.mark.parametrize("where", ["near", "far"])
@on_loop
async def test_a_cancellation_frees_its_blocks(where: str) -> None:
    async with mesh("a", "b") as (a, b):
        await (a if where == "near" else b).host()
        host = a if a.hosted else b
        engine = host.engine(next(iter(host.hosted)))
        stream = await a.ask("r1", [1] * 100, 400)
        await soon(lambda: stream.tokens)
        assert engine.model.used_blocks >= 7
        await a.client.abort_requests_async(["r1"])
        await soon(lambda: not engine.model.used_blocks and not engine.model.has_work, within=1)


@on_loop
async def test_a_cancellation_in_the_queue() -> None:
    async with mesh("a", "b") as (a, b):
        gate = Gate()
        instance = await b.host(clock=gate.clock())
        await a.ask("first", [1] * 500, 10)
        await soon(lambda: gate.waiting)
        for n in range(5):
            await a.ask(f"r{n}", [1] * 300, 10)
        await soon(lambda: len(b.hosted[instance].requests) == 6)
        await a.client.abort_requests_async([f"r{n}" for n in range(5)])
        await soon(lambda: len(b.hosted[instance].requests) == 1, within=1)
        gate.open()


@on_loop
async def test_a_cancellation_while_it_is_being_dispatched() -> None:
    async with mesh("a", "b") as (a, b):
        instance = await b.host()
        frozen, asked = asyncio.Event(), asyncio.Event()

        async def slow(*arguments: Any) -> Route:
            asked.set()
            await frozen.wait()
            return a.route(instance)

        a.dispatch = slow
        await a.ask("r1", PROMPT)
        await asked.wait()
        await a.client.abort_requests_async(["r1"])
        frozen.set()
        await soon(a.clean)
        assert b.hosted[instance].load().received == {}, "it was never sent"
        a.dispatch = a._dispatch
        assert await a.answered("r1", PROMPT) == answer(PROMPT, 8), "the id is free again"


@on_loop
async def test_a_cancellation_while_the_link_is_being_dialled() -> None:
    async with mesh("a", "b") as (a, b):
        instance = await b.host()
        frozen, dialling = asyncio.Event(), asyncio.Event()
        dial = a.peers._dial

        async def slow(node: str) -> Any:
            dialling.set()
            await frozen.wait()
            return await dial(node)

        a.peers._dial = slow  # type: ignore[method-assign]
        stream = await a.ask("r1", [1] * 50, 400)
        await dialling.wait()
        abort = asyncio.create_task(a.client.abort_requests_async(["r1"]))
        await soon(lambda: "r1" not in a.client.ledger)
        frozen.set()
        await abort
        await soon(lambda: b.hosted[instance].load().received and not b.hosted[instance].requests)
        assert not stream.tokens


# ---- what arrives twice, late or not at all ----


@on_loop
async def test_outputs_of_a_former_owner_are_dropped() -> None:
    async with mesh("a", "b") as (a, b):
        gate = Gate()
        first = await b.host(clock=gate.clock())
        second = await b.host()
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: gate.waiting)
        entry = a.client.ledger.get("r1")
        assert entry is not None and (entry.owner, entry.epoch) == (first, 1)
        # The instance is believed lost, and goes on all the same.
        a.target = second
        a.client.deliver(Lost(first, [1], ["r1"], "it was cut off"))
        await soon(lambda: stream.ended)
        gate.let(1)
        await soon(lambda: a.client.ledger.dropped[Acceptance.UNKNOWN] == 1)
        await soon(lambda: not b.hosted[first].requests)  # the orphan is ended where it runs
        gate.open()
        assert stream.tokens == answer(PROMPT, 8)
        assert a.client.ledger.dropped.total() == 1


@on_loop
async def test_a_frame_that_comes_twice_counts_once() -> None:
    async with mesh("a", "b") as (a, b):
        await b.host()

        class Twice:
            node, node_found, node_lost = "a", a.client.node_found, a.client.node_lost

            def deliver(self, frame: Any, stats: Any = None) -> None:
                a.client.deliver(frame, stats)
                if isinstance(frame, Outputs):
                    a.client.deliver(frame, stats)

        a.exchange.bind(Twice())
        assert await a.answered("r1", PROMPT) == answer(PROMPT, 8)
        dropped = a.client.ledger.dropped
        assert dropped[Acceptance.REPEATED] + dropped[Acceptance.UNKNOWN] == 8


@on_loop
async def test_a_lost_frame_of_an_old_epoch_ends_nothing() -> None:
    async with mesh("a") as (a,):
        gate = Gate()
        await a.host(clock=gate.clock())
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: gate.waiting)
        a.client.deliver(Lost("b-0", [0], ["r1"], "an echo", retry=False))
        a.client.deliver(Lost("b-0", [1], ["unknown"], "an echo", retry=False))
        gate.open()
        await soon(lambda: stream.ended)
        assert stream.tokens == answer(PROMPT, 8)


# ---- deaths ----


async def _two_requests(a: MeshNode, b: MeshNode) -> tuple[Any, Any, Gate, str, str]:
    """At a, one that has tokens of an instance of b and one that has none, and another instance."""
    gate = Gate()
    first = await b.host(clock=gate.clock())
    second = await a.host()
    begun = await a.ask("begun", PROMPT)
    await soon(lambda: gate.waiting)
    gate.let(1)
    await soon(lambda: begun.tokens)
    fresh = await a.ask("fresh", [4, 5])
    await soon(lambda: len(b.hosted[first].requests) == 2)
    return begun, fresh, gate, first, second


@on_loop
async def test_an_engine_dies() -> None:
    async with mesh("a", "b") as (a, b):
        begun, fresh, _, first, second = await _two_requests(a, b)
        a.target = second
        b.engine(first).die("instance b-0 died: killed")
        await soon(lambda: begun.ended and fresh.ended)
        assert begun.tokens == answer(PROMPT, 8), "from its second token on"
        assert fresh.tokens == answer([4, 5], 8)


@on_loop
async def test_the_connection_is_cut() -> None:
    async with mesh("a", "b") as (a, b):
        begun, fresh, gate, first, second = await _two_requests(a, b)
        a.target = second
        for link in list(b.peers._links.values()):
            await link.close()
        await soon(lambda: begun.ended and fresh.ended)
        assert begun.tokens == answer(PROMPT, 8)
        assert fresh.tokens == answer([4, 5], 8)
        gate.open()
        await soon(lambda: not b.hosted[first].requests, within=1)
        assert not a.client.ledger.dropped, "the far side's outputs had no way to come"
        a.target = first
        assert await a.answered("again", PROMPT) == answer(PROMPT, 8), "it dials again"


@on_loop
async def test_the_node_that_asked_is_gone() -> None:
    """Its requests end at the instances too."""
    async with mesh("a", "b") as (a, b):
        gate = Gate()
        first = await b.host(clock=gate.clock())
        await a.ask("r1", [1] * 100, 100)
        own = await b.ask("own", PROMPT, 8)
        await soon(lambda: len(b.hosted[first].requests) == 2)
        a.target = None  # nowhere to go on
        for link in list(a.peers._links.values()):
            await link.close()
        await soon(lambda: len(b.hosted[first].requests) == 1, within=1)
        gate.open()
        await soon(lambda: own.ended)
        assert own.tokens == answer(PROMPT, 8)


@on_loop
async def test_no_instance_is_a_failure_with_its_reason() -> None:
    async with mesh("a") as (a,):
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: stream.ended)
        assert stream.failure == "no instance was ready within 2 s (--failover-timeout)"


@on_loop
async def test_a_request_that_no_engine_can_run_is_tried_once() -> None:
    async with mesh("a", "b") as (a, b):
        await b.host()
        stream = await a.ask("r1", [1] * 600)
        await soon(lambda: stream.ended)
        assert stream.failure is not None and "512" in stream.failure
        assert a.decisions == 1


@on_loop
async def test_a_request_that_no_link_can_carry_costs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with mesh("a", "b") as (a, b):
        gate = Gate()
        await b.host(clock=gate.clock())
        other = await a.ask("r1", PROMPT)
        await soon(lambda: gate.waiting)
        monkeypatch.setattr("llumnix.dataplane.peer_link.MAX_FRAME", 1000)
        large = await a.ask("large", [300] * 400)
        await soon(lambda: large.ended)
        assert large.failure is not None and "too much for one message" in large.failure
        assert a.client.ledger.get("large") is None and a.peers.open == 1
        gate.open()
        await soon(lambda: other.ended)
        assert other.tokens == answer(PROMPT, 8)


@on_loop
async def test_an_instance_that_has_left_its_node_is_asked_a_few_times() -> None:
    async with mesh("a", "b") as (a, b):
        instance = await b.host()
        hosted = b.hosted.pop(instance)
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: stream.ended)
        assert stream.failure is not None and instance in stream.failure
        assert 1 < a.decisions < 50, "with pauses, until --failover-timeout"
        b.hosted[instance] = hosted


@on_loop
async def test_who_has_lost_a_request_is_not_asked_again() -> None:
    """The dispatcher's view still shows it as ready, and now as the emptiest of all."""
    async with mesh("a", "b") as (a, b):
        gate = Gate()
        first, second = await b.host(clock=gate.clock()), await a.host()
        avoided: list[frozenset[str]] = []

        async def prefer_the_first(tokens: int, priority: int, avoid: frozenset[str]) -> Route:
            avoided.append(avoid)
            return a.route(second if first in avoid else first)

        a.dispatch = prefer_the_first
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: gate.waiting)
        b.engine(first).die("instance b-0 died: killed")
        await soon(lambda: stream.ended)
        assert stream.tokens == answer(PROMPT, 8)
        assert avoided == [frozenset(), frozenset({first})]


@on_loop
async def test_a_node_without_an_address() -> None:
    async with mesh("a") as (a,):
        a.known = {"b-0": "b"}
        a._mesh.instances["b-0"] = "b"
        a.target = "b-0"
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: stream.ended)
        assert stream.failure is not None and "left the cluster" in stream.failure


@on_loop
async def test_a_dispatcher_that_fails_is_told() -> None:
    async with mesh("a") as (a,):

        async def refuse(*arguments: Any) -> Route:
            raise EngineError("closed for today")

        a.dispatch = refuse
        stream = await a.ask("r1", PROMPT)
        await soon(lambda: stream.ended)
        assert stream.failure == "closed for today"


@on_loop
async def test_whoever_can_be_reached_is() -> None:
    async with mesh("a", "b", "c") as (a, b, c):
        await a.exchange.reach(["b", "c", "gone"], within=5)
        assert (a.peers.open, b.peers.open, c.peers.open) == (2, 1, 1)
        await a.exchange.reach([], within=5)


# ---- utility calls ----


@on_loop
async def test_utility_calls_go_everywhere() -> None:
    async with mesh("a", "b") as (a, b):
        await a.host()
        await b.host()
        assert await a.client.reset_prefix_cache_async() is True
        assert await a.client.is_sleeping_async() is False
        assert await a.client.get_supported_tasks_async() == ("generate",)
        with pytest.raises(EngineError, match="no add_lora"):
            await a.client.add_lora_async(LoRARequest("french", 1, "/adapters/french"))
        with pytest.raises(EngineError, match="is not on node b"):
            await a.exchange.call("b", "b-9", "is_sleeping", (), 1.0)


@on_loop
async def test_a_call_that_meets_a_migration_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration holds blocks of requests that run no more; vLLM knows nobody who does."""
    async with mesh("a") as (a,):
        instance = await a.host()
        held = [EngineError(f"Call to sleep method failed: {BLOCKS_HELD} …")] * 2
        calls: list[str] = []

        async def answer(method: str, *args: Any) -> Any:
            calls.append(method)
            if held:
                raise held.pop()

        a.engine(instance).call = answer  # type: ignore[method-assign]
        await a.client.sleep_async(1, "abort")
        assert calls == ["sleep"] * 3
        monkeypatch.setattr(utility_calls, "HELD_SECONDS", 0.0)
        held.append(EngineError(BLOCKS_HELD))
        with pytest.raises(EngineError, match=BLOCKS_HELD):
            await a.client.sleep_async(1, "abort")


@on_loop
async def test_a_utility_call_before_others_see_the_instance() -> None:
    """So does a frontend that loads its adapters while it opens."""
    async with mesh("a") as (a,):
        await a.host()
        a.known = {}
        assert await a.client.reset_prefix_cache_async() is True


@on_loop
async def test_a_call_whose_answer_cannot_travel_fails_at_once() -> None:
    async with mesh("a", "b") as (a, b):
        instance = await b.host()

        async def answer_with_an_object(method: str, *args: Any) -> Any:
            return object()

        b.engine(instance).call = answer_with_an_object  # type: ignore[method-assign]
        with pytest.raises(EngineError):
            await a.exchange.call("b", instance, "list_loras", (), 5.0)


@on_loop
async def test_a_peer_may_not_have_any_code_run() -> None:
    async with mesh("a", "b") as (a, b):
        instance = await b.host()
        with pytest.raises(EngineError, match="a peer may not call collective_rpc"):
            await a.exchange.call("b", instance, "collective_rpc", (b"code",), 5.0)


@on_loop
async def test_a_slow_call_holds_up_nothing() -> None:
    async with mesh("a", "b") as (a, b):
        instance = await b.host()
        frozen = asyncio.Event()

        async def slow(method: str, *args: Any) -> Any:
            await frozen.wait()
            return method

        b.engine(instance).call = slow  # type: ignore[method-assign]
        call = asyncio.create_task(a.exchange.call("b", instance, "sleep", (), 10.0))
        assert await a.answered("r1", PROMPT) == answer(PROMPT, 8)
        assert not call.done()
        frozen.set()
        assert await call == "sleep"


@on_loop
async def test_a_call_that_is_cut_off() -> None:
    async with mesh("a", "b") as (a, b):
        instance = await b.host()
        frozen = asyncio.Event()

        async def slow(method: str, *args: Any) -> Any:
            await frozen.wait()

        b.engine(instance).call = slow  # type: ignore[method-assign]
        call = asyncio.create_task(a.exchange.call("b", instance, "sleep", (), 10.0))
        await soon(lambda: b.peers.open and b.exchange._tasks)
        for link in list(b.peers._links.values()):
            await link.close()
        with pytest.raises(EngineError, match="lost the connection to node b"):
            await call
        frozen.set()
