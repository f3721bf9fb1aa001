"""The engine-core client when events overtake one another: one owner at a time, always."""

import asyncio
import time
from http import HTTPStatus
from typing import Any

import pytest
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
)

from llumnix.dataplane.client import ClusterClient
from llumnix.dataplane.frames import Cancel, Lost, Outputs, Submit
from llumnix.dataplane.hosted_request import NO_RESUME, TRIAL_TOKENS
from llumnix.dataplane.placer import Route
from llumnix.dataplane.suspects import DEATHS, EXCUSED, WAVE_SECONDS
from llumnix.engine.base import EngineDead
from tests.kit.loop import on_loop, soon
from tests.kit.requests import core_request


class HeldExchange:
    """Takes requests for node n only when it is let, and then refuses them; others at once."""

    node = "home"

    def __init__(self) -> None:
        self.hosted: dict[str, Any] = {}
        self.refuse = asyncio.Event()
        self.submitted: list[tuple[str, int]] = []
        self.cancelled: list[str] = []

    def bind(self, home: Any) -> None:
        self.home = home

    def slot(self, instance: str) -> None:
        """None of its instances is of this machine's node."""

    async def submit(self, node: str, frame: Submit) -> None:
        self.submitted.append((frame.instance, frame.epoch))
        if node == "n":
            await self.refuse.wait()
            raise EngineDead("node n does not answer")

    async def cancel(self, node: str, frame: Cancel) -> None:
        self.cancelled.append(frame.instance)


class InTurn:
    """A dispatcher that decides for these (instance, node) in turn."""

    def __init__(self, *routes: tuple[str, str]) -> None:
        self._left = list(routes)

    def ready(self) -> dict[str, str]:
        return {}

    def awaited(self) -> bool:
        return False

    async def decide(self, tokens: int, priority: int, avoid: frozenset[str]) -> Route:
        instance, node = self._left.pop(0)
        return Route(instance, node, 1)

    def undo(self, route: Route) -> None:
        """Nothing counts what it has sent."""


def make(exchange: HeldExchange, *routes: tuple[str, str], **kwargs: Any) -> ClusterClient:
    """A client whose dispatcher decides for these (instance, node) in turn."""
    return ClusterClient(exchange, InTurn(*routes), slots=1, **kwargs)  # type: ignore[arg-type]


@on_loop
async def test_a_node_is_lost_while_a_request_is_on_its_way_there() -> None:
    exchange = HeldExchange()
    client = make(exchange, ("n-0", "n"), ("y-0", "y"), ("z-0", "z"))
    await client.add_request_async(core_request("r", [1]))
    await soon(lambda: exchange.submitted)
    exchange.home.node_lost("n", "lost the connection to node n")
    await soon(lambda: len(exchange.submitted) == 2)
    owner, epoch = exchange.submitted[1]
    client.deliver(Outputs(owner, 0.0, [epoch], [0], [EngineCoreOutput("r", [11, 12])]))
    exchange.refuse.set()  # only now does the first try fail
    await soon(lambda: not client._tasks)
    entry = client.ledger.get("r")
    assert [instance for instance, _ in exchange.submitted] == ["n-0", "y-0"]
    assert entry is not None and (entry.owner, entry.epoch, entry.tokens) == (
        "y-0",
        epoch,
        [11, 12],
    )


@on_loop
async def test_a_loss_that_is_told_twice() -> None:
    exchange = HeldExchange()
    client = make(exchange, ("x-0", "x"), ("y-0", "y"), ("z-0", "z"))
    await client.add_request_async(core_request("r", [1]))
    await soon(lambda: exchange.submitted)
    client.deliver(Lost("x-0", [1], ["r"], "x-0 died"))
    exchange.home.node_lost("x", "lost the connection to node x")
    await soon(lambda: not client._tasks)
    assert [instance for instance, _ in exchange.submitted] == ["x-0", "y-0"]


@on_loop
async def test_engines_that_die_together_say_nothing_of_a_request() -> None:
    """Whoever killed them all did not need a request for it; only so many are forgiven."""
    exchange = HeldExchange()
    exchange.refuse.set()
    client = make(exchange, *((f"x-{n}", "x") for n in range(40)))
    failures: list[str] = []
    client.bind(lambda request_id, reason, status: failures.append(request_id))
    entries = []
    for request_id in ("r", "s"):
        await client.add_request_async(core_request(request_id, [1]))
        entry = client.ledger.get(request_id)
        assert entry is not None
        entries.append(entry)
    r, _ = entries
    rounds = 0
    while not failures:
        await soon(lambda: bool(failures) or all(e.owner is not None for e in entries))
        for request_id, entry in zip(("s", "r"), reversed(entries), strict=True):
            assert entry.owner is not None
            lost = Lost(entry.owner, [entry.epoch], [request_id], "it died", died=True)
            client.deliver(lost)
        rounds += 1
        assert r.deaths == max(rounds - EXCUSED, 0)
    assert rounds == EXCUSED + DEATHS + 1
    client.shutdown()


@on_loop
async def test_a_request_that_outlives_too_many_owners_is_given_up() -> None:
    exchange = HeldExchange()
    client = make(exchange, *((f"x-{n}", "x") for n in range(9)))
    failures: list[tuple[str, str, HTTPStatus]] = []
    client.bind(lambda *failure: failures.append(failure))
    await client.add_request_async(core_request("r", [1]))
    for number in range(DEATHS + 1):
        await soon(lambda number=number: len(exchange.submitted) == number + 1)
        instance, epoch = exchange.submitted[-1]
        client.deliver(Lost(instance, [epoch], ["r"], f"{instance} died", died=True))
    reason = f"request r is given up, as 3 engines died while they ran it: x-{DEATHS} died"
    assert failures == [("r", reason, HTTPStatus.INTERNAL_SERVER_ERROR)] and not len(client.ledger)
    await soon(lambda: not client._tasks)


@on_loop
async def test_the_next_engine_is_not_tried_before_all_that_died_together_are_known() -> None:
    """Two deaths in a moment may be of the same cause as a third that nobody has heard of yet."""
    exchange = HeldExchange()
    client = make(exchange, *((f"x-{n}", "x") for n in range(9)))
    client.bind(lambda *failure: None)
    await client.add_request_async(core_request("r", [1]))
    for number in range(DEATHS):
        await soon(lambda number=number: len(exchange.submitted) == number + 1)
        instance, epoch = exchange.submitted[-1]
        client.deliver(Lost(instance, [epoch], ["r"], f"{instance} died", died=True))
    heard = time.monotonic()
    await soon(lambda: len(exchange.submitted) == DEATHS + 1)
    assert time.monotonic() - heard >= WAVE_SECONDS
    client.shutdown()


@on_loop
async def test_a_bug_in_the_dispatcher_ends_the_request_with_an_error() -> None:
    class Buggy(InTurn):
        async def decide(self, tokens: int, priority: int, avoid: frozenset[str]) -> Route:
            raise RuntimeError("a bug")

    client = ClusterClient(HeldExchange(), Buggy(), slots=1)  # type: ignore[arg-type]
    failures: list[str] = []
    client.bind(lambda request_id, reason, status: failures.append(reason))
    await client.add_request_async(core_request("r", [1]))
    await soon(lambda: failures)
    assert failures == ["internal error: RuntimeError"] and not len(client.ledger)


@on_loop
async def test_a_request_that_was_refused_is_shown_to_an_engine_and_ended() -> None:
    """vLLM has the engine's KV connector let go of what it keeps for it; no output will come."""
    exchange = HeldExchange()
    opened: list[object] = []
    client = make(exchange, ("y-0", "y"), on_open=[opened.append])
    request = core_request("r", [1])
    request.abort_immediately = True
    await client.add_request_async(request)
    await soon(lambda: exchange.cancelled)
    assert (exchange.submitted, exchange.cancelled) == ([("y-0", 1)], ["y-0"])
    assert client.ledger.get("r") is None and not opened


@on_loop
async def test_each_request_ends_once() -> None:
    exchange = HeldExchange()
    ended: list[str] = []
    client = make(exchange, ("y-0", "y"), ("y-0", "y"), ("z-0", "z"), on_close=[ended.append])
    client.bind(lambda *failure: None)
    for name in ("done", "gone", "failed"):
        await client.add_request_async(core_request(name, [1]))
    await soon(lambda: len(exchange.submitted) == 3)
    last = EngineCoreOutput("done", [11], finish_reason=FinishReason.STOP)
    client.deliver(Outputs("y-0", 0.0, [1], [0], [last]))
    await client.abort_requests_async(["gone", "done"])
    client.deliver(Lost("z-0", [1], ["failed"], "it can't run here", retry=False))
    assert ended == ["done", "gone", "failed"]


@on_loop
async def test_what_engines_cannot_resume_ends_and_is_not_begun_again() -> None:
    """With an operator's own scheduler class; before its first token it can begin elsewhere."""
    exchange = HeldExchange()
    client = make(exchange, *(("y-0", "y"),) * 2, ("z-0", "z"), resumes=False)
    failures: list[str] = []
    client.bind(lambda request_id, reason, status: failures.append(reason))
    for name in ("begun", "new"):
        await client.add_request_async(core_request(name, [1]))
    await soon(lambda: len(exchange.submitted) == 2)
    client.deliver(Outputs("y-0", 0.0, [1], [0], [EngineCoreOutput("begun", [11])]))
    client.deliver(Lost("y-0", [1, 1], ["begun", "new"], "y-0 died", died=True))
    await soon(lambda: len(exchange.submitted) == 3)
    assert failures == [f"y-0 died; the request can't go on elsewhere: {NO_RESUME}"]
    assert list(client.ledger) == ["new"] and exchange.submitted[2][0] == "z-0"


@on_loop
async def test_a_suspect_that_went_on_generating_is_cleared_however_late() -> None:
    """Its trial may end before it has generated anything: a long prompt, a queue, a move."""
    exchange = HeldExchange()
    client = make(exchange, *((f"x-{n}", "x") for n in range(DEATHS + 2)))
    await client.add_request_async(core_request("r", [1]))
    for number in range(DEATHS + 1):
        await soon(lambda number=number: len(exchange.submitted) == number + 1)
        instance, epoch = exchange.submitted[-1]
        if number == DEATHS:  # all at once, and its engine dies in the same moment
            output = EngineCoreOutput("r", list(range(TRIAL_TOKENS)))
            client.deliver(Outputs(instance, 0.0, [epoch], [0], [output]))
        client.deliver(Lost(instance, [epoch], ["r"], f"{instance} died", died=True))
    await soon(lambda: len(exchange.submitted) == DEATHS + 2)
    entry = client.ledger.get("r")
    assert entry is not None and (entry.deaths, entry.crashes) == (DEATHS, DEATHS + 1)
    client.shutdown()


@on_loop
async def test_suspects_of_two_servers_that_die_together_are_tried_again() -> None:
    """Each server tries one at a time, but the other one's may be at the same instance."""
    exchange = HeldExchange()
    client = make(exchange, *((f"x-{n}", "x") for n in range(DEATHS + 3)))
    failures: list[str] = []
    client.bind(lambda request_id, reason, status: failures.append(reason))
    await client.add_request_async(core_request("r", [1]))
    for number in range(DEATHS + 2):
        await soon(lambda number=number: len(exchange.submitted) == number + 1)
        instance, epoch = exchange.submitted[-1]
        together = number == DEATHS
        lost = Lost(instance, [epoch], ["r"], "it died", died=True, together=together)
        client.deliver(lost)
    assert len(failures) == 1 and "as 4 engines died" in failures[0], "the last time it was alone"


@pytest.mark.parametrize(
    ("faults", "tried"),
    [
        ([("RuntimeError", True), ("RuntimeError", True)], 2),
        ([("RuntimeError", False), ("RuntimeError", True)], 2),
        ([("RuntimeError", True), ("RuntimeError", False)], DEATHS + 1),  # a newcomer's, perhaps
        ([("RuntimeError", True), ("MemoryError", True)], DEATHS + 1),
        ([("", False), ("RuntimeError", True)], DEATHS + 1),  # the first was killed
        ([("RuntimeError", True), ("", False)], DEATHS + 1),
        ([("RuntimeError", True), ("", False), ("RuntimeError", True)], 3),
    ],
)
def test_what_fails_twice_in_the_same_way_is_not_tried_a_third_time(
    faults: list[tuple[str, bool]], tried: int
) -> None:
    @on_loop
    async def check() -> None:
        exchange = HeldExchange()
        client = make(exchange, *((f"x-{n}", "x") for n in range(9)))
        failures: list[tuple[str, str, HTTPStatus]] = []
        client.bind(lambda *failure: failures.append(failure))
        await client.add_request_async(core_request("r", [1]))
        for number in range(tried):
            await soon(lambda number=number: len(exchange.submitted) == number + 1)
            assert not failures
            fault, alone = faults[number] if number < len(faults) else ("", False)
            lost = Lost("", [exchange.submitted[-1][1]], ["r"], "it died", died=True)
            lost.instance, lost.fault, lost.alone = exchange.submitted[-1][0], fault, alone
            client.deliver(lost)
        reason = f"request r is given up, as {tried} engines died while they ran it: it died"
        assert failures == [("r", reason, HTTPStatus.INTERNAL_SERVER_ERROR)]
        await soon(lambda: not client._tasks)

    check()


@on_loop
async def test_a_request_that_passes_its_trial_is_as_any_other() -> None:
    exchange = HeldExchange()
    client = make(exchange, *((f"x-{n}", "x") for n in range(9)))
    await client.add_request_async(core_request("r", [1]))
    await soon(lambda: len(exchange.submitted) == 1)
    lost = Lost("x-0", [1], ["r"], "it died", died=True, fault="RuntimeError", alone=True)
    client.deliver(lost)
    await soon(lambda: len(exchange.submitted) == 2)
    entry = client.ledger.get("r")
    assert entry is not None and client.placer._trials.locked()
    output = EngineCoreOutput("r", list(range(TRIAL_TOKENS)))
    client.deliver(Outputs("x-1", 0.0, [entry.epoch], [0], [output]))
    await soon(lambda: not client.placer._trials.locked())
    assert (entry.deaths, entry.crashes, entry.fault) == (0, 1, "")
    client.shutdown()


class DyingExchange(HeldExchange):
    """Its instance has died already, and says so before the request is even there."""

    client: ClusterClient

    async def submit(self, node: str, frame: Submit) -> None:
        await super().submit(node, frame)
        if len(self.submitted) == DEATHS + 1:
            lost = Lost(frame.instance, [frame.epoch], [frame.request.request_id], "it is gone")
            self.client.deliver(lost)


@on_loop
async def test_a_trial_where_the_engine_is_gone_holds_nobody_up() -> None:
    exchange = DyingExchange()
    exchange.client = client = make(exchange, *((f"x-{n}", "x") for n in range(DEATHS + 2)))
    await client.add_request_async(core_request("r", [1]))
    for number in range(DEATHS):
        await soon(lambda number=number: len(exchange.submitted) == number + 1)
        instance, epoch = exchange.submitted[-1]
        client.deliver(Lost(instance, [epoch], ["r"], f"{instance} died", died=True))
    await soon(lambda: len(exchange.submitted) == DEATHS + 2, within=5)
    client.shutdown()


@on_loop
async def test_events_on_another_machine_are_told_by_our_clock() -> None:
    exchange = HeldExchange()
    client = make(exchange, ("y-0", "y"))
    await client.add_request_async(core_request("r", [1]))
    await soon(lambda: exchange.submitted)
    there = -5_000.0  # its clock began later
    event = EngineCoreEvent(EngineCoreEventType.SCHEDULED, there - 0.25)
    output = EngineCoreOutput("r", [11], events=[event])
    client.deliver(Outputs("y-0", there, [1], [0], [output]))
    step: EngineCoreOutputs = await client.get_output_async()
    assert abs(step.timestamp - time.monotonic()) < 5.0
    assert abs(event.timestamp - (step.timestamp - 0.25)) < 1e-6


@on_loop
async def test_a_crowd_that_leaves_at_once_is_one_message_to_each_engine() -> None:
    """A thousand messages would hold up the node's loop, and each engine between two steps."""
    exchange = HeldExchange()
    client = make(exchange, *[("x-0", "home"), ("y-0", "m")] * 100)
    names = [f"r{n}" for n in range(200)]
    for name in names:
        await client.add_request_async(core_request(name, [1, 2]))
    await soon(lambda: len(exchange.submitted) == 200)
    await asyncio.gather(*(client.abort_requests_async([name]) for name in names))
    assert sorted(exchange.cancelled) == ["x-0", "y-0"] and not len(client.ledger)


@on_loop
async def test_requests_end_though_whoever_ends_them_is_cancelled() -> None:
    exchange = HeldExchange()
    client = make(exchange, ("x-0", "home"))
    await client.add_request_async(core_request("r1", [1, 2]))
    await soon(lambda: exchange.submitted)
    ending = asyncio.create_task(client.abort_requests_async(["r1"]))
    await asyncio.sleep(0)
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    await soon(lambda: exchange.cancelled == ["x-0"])


@on_loop
async def test_a_failure_before_there_is_a_frontend_is_an_error_and_no_silence() -> None:
    client = make(HeldExchange(), ("y-0", "y"))
    await client.add_request_async(core_request("r", [1]))
    await soon(lambda: not client._tasks)
    with pytest.raises(RuntimeError, match="there is no frontend yet"):
        client.deliver(Lost("y-0", [1], ["r"], "it can't run here", retry=False))
