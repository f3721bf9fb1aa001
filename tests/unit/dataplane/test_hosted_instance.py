"""One instance and the requests it runs: whose they are, where they stand, what load they make."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
)
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.cluster import kv_blocks
from llumnix.dataplane.frames import Lost, Outputs, Submit
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import NO_RESUME, TRIAL_TOKENS
from llumnix.engine.base import Death, EngineError, EngineEvents, EngineFacts
from llumnix.engine.sim.instance import SimEngine
from llumnix.migration.departures import candidates
from tests.kit.engines import IdleEngine
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import SMALL, Gate
from tests.kit.requests import answer, core_request


@dataclass(eq=False)
class Recorder:
    """An API server that writes down what it is handed."""

    node: str
    frames: list[Outputs | Lost] = field(default_factory=list)
    stats: int = 0
    running: int = 0  # requests, by the last of them

    def deliver(self, frame: Outputs | Lost, stats: SchedulerStats | None = None) -> None:
        self.frames.append(frame)
        if stats is not None:
            self.stats += 1
            self.running = stats.num_running_reqs

    def got(self, name: str) -> list[tuple[int, int, list[int]]]:
        """Epoch, position and tokens of each output for a request."""
        return [
            (epoch, position, output.new_token_ids)
            for frame in self.frames
            if isinstance(frame, Outputs)
            for epoch, position, output in zip(
                frame.epochs, frame.positions, frame.outputs, strict=True
            )
            if output.request_id == name
        ]

    @property
    def lost(self) -> list[Lost]:
        return [frame for frame in self.frames if isinstance(frame, Lost)]


def submit(
    name: str, prompt: list[int], max_tokens: int = 4, epoch: int = 1, sequence: int = 1
) -> Submit:
    return Submit("a-0", epoch, sequence, core_request(name, prompt, max_tokens))


class Hosted:
    """An instance whose engine steps when the test says so."""

    def __init__(self, by_priority: bool = False) -> None:
        self.gate = Gate()
        self.home, self.away = Recorder("a"), Recorder("b")
        self.engine = SimEngine("a-0", SMALL, self.gate.clock())
        self.changes = 0  # of the load, that it has told
        self.deaths: list[str] = []  # and why its engine has died
        self.instance = HostedInstance(self.engine, lambda: self.home, self._changed, by_priority)

    def _changed(self) -> None:
        self.changes += 1

    async def __aenter__(self) -> "Hosted":
        await self.instance.start(self.deaths.append)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.engine.stop(1.0)

    async def steps(self, number: int) -> None:
        """Let so many steps end, one after the other."""
        for _ in range(number):
            await soon(lambda: self.gate.waiting)
            before = self.home.stats
            self.gate.let(1)
            await soon(lambda before=before: self.home.stats > before)


@on_loop
async def test_a_step_is_one_frame_for_each_origin() -> None:
    async with Hosted() as hosted:
        await hosted.instance.submit(hosted.home, submit("h1", [1, 2]))
        await hosted.instance.submit(hosted.away, submit("f1", [3, 4], epoch=7))
        await hosted.instance.submit(hosted.away, submit("f2", [5, 6], epoch=2))
        await hosted.steps(4)
        assert len(hosted.away.frames) == 4 and hosted.away.stats == 0
        assert len(hosted.home.frames) == 4 and hosted.home.stats == 4
        for origin, name, epoch, prompt in (
            (hosted.home, "h1", 1, [1, 2]),
            (hosted.away, "f1", 7, [3, 4]),
            (hosted.away, "f2", 2, [5, 6]),
        ):
            tokens = answer(prompt, 4)
            assert origin.got(name) == [(epoch, n, [tokens[n]]) for n in range(4)]
        assert len(hosted.instance.requests) == 0


@on_loop
async def test_its_own_node_gets_statistics_of_steps_for_others() -> None:
    async with Hosted() as hosted:
        await hosted.instance.submit(hosted.away, submit("f1", [3, 4]))
        await hosted.steps(1)
        assert hosted.home.stats == 1 and hosted.home.got("f1") == []


@on_loop
async def test_the_load_counts_what_came_since_the_last_step() -> None:
    async with Hosted() as hosted:
        assert hosted.instance.load().used_blocks == 0
        await hosted.instance.submit(hosted.home, submit("r1", [1] * 20, 64, sequence=5))
        await hosted.steps(1)
        await hosted.instance.submit(hosted.away, submit("r2", [2] * 40, 64, sequence=9))
        await hosted.instance.submit(hosted.away, submit("r3", [3] * 10, 64, sequence=8))
        load = hosted.instance.load()
        assert (load.running, load.waiting) == (1, 2)
        assert (load.used_blocks, load.waiting_blocks, load.head_blocks) == (2, 3 + 1, 3)
        assert load.received == {"a": 5, "b": 9}
        assert hosted.changes >= 4
        await hosted.instance.cancel(["r1", "r2", "r3"])
        load = hosted.instance.load()
        assert (load.running, load.waiting, load.used_blocks, load.waiting_blocks) == (0, 0, 0, 0)


@on_loop
async def test_what_was_preempted_asks_for_room_again_and_before_all_others() -> None:
    async with Hosted() as hosted:
        for n in range(3):  # 21 blocks each, of 64, and then one more
            await hosted.instance.submit(hosted.home, submit(f"r{n}", [n] * 330, 100))
        while not any(held.started for held in hosted.instance.order.queue):
            await hosted.steps(1)
        await hosted.instance.submit(hosted.away, submit("r3", [3] * 20))
        preempted, fresh = hosted.instance.order.queue
        assert (preempted.request_id, fresh.request_id) == ("r2", "r3")
        load = hosted.instance.load()
        assert (load.running, load.waiting, load.preempted) == (2, 2, 1)
        again = kv_blocks(preempted.tokens, 16)
        assert (load.head_blocks, load.waiting_blocks) == (again, again + 2)
        assert [c.request for c in candidates(hosted.instance) if c.head] == ["r2"]
        hosted.gate.open()
        await soon(lambda: not hosted.instance.requests)
        assert hosted.instance.load().preemptions == hosted.engine.model.preemptions > 0


@on_loop
async def test_who_comes_with_outputs_is_the_next_to_run() -> None:
    """As the scheduler has it: it was running before, elsewhere."""
    async with Hosted() as hosted:
        for n in range(2):  # 29 blocks each, of 64
            await hosted.instance.submit(hosted.home, submit(f"r{n}", [n] * 450, 60))
        await hosted.steps(1)
        await hosted.instance.submit(hosted.home, submit("fresh", [2] * 330, 100))
        resumed = core_request("resumed", [3] * 400, 100)
        await hosted.instance.submit(hosted.home, Submit("a-0", 2, 1, resumed, [11] * 20))
        await hosted.steps(1)
        assert [t.request_id for t in hosted.instance.order.queue] == ["resumed", "fresh"]
        assert hosted.engine.model.queued() == ["resumed~2", "fresh"]
        load = hosted.instance.load()
        assert (load.running, load.waiting, load.preempted) == (2, 2, 0)
        assert (load.head_blocks, load.waiting_blocks) == (27, 27 + 21)
        assert [c.request for c in candidates(hosted.instance) if c.head] == ["resumed"]


@on_loop
async def test_a_queue_that_goes_by_priority() -> None:
    """The most urgent is the head, whether it has begun or not; who is preempted is the least."""
    async with Hosted(by_priority=True) as hosted:
        for n, (name, priority) in enumerate([("batch", 2), ("usual", 0), ("other", 2)]):
            request = core_request(name, [n] * 40, 100, priority=priority)
            request.arrival_time = float(n)
            await hosted.instance.submit(hosted.home, Submit("a-0", 1, 1, request, []))
        await hosted.steps(1)
        for name, priority in (("late", 0), ("high", -1)):
            request = core_request(name, [7] * 40, 100, priority=priority)
            request.arrival_time = 9.0
            await hosted.instance.submit(hosted.home, Submit("a-0", 1, 1, request, []))
        hosted.instance.order.step(2, [])  # as the engine would say that has preempted one
        assert [t.request_id for t in hosted.instance.order.queue] == ["high", "late", "other"]
        hosted.instance.order.step(1, [])
        assert [t.request_id for t in hosted.instance.order.queue] == [
            "high",
            "late",
            "batch",
            "other",
        ]
        assert [c.request for c in candidates(hosted.instance) if c.head] == ["high"]
        hosted.instance.order.step(4, [])
        assert [t.request_id for t in hosted.instance.order.queue] == ["other"]


@on_loop
async def test_what_cannot_run_is_given_back() -> None:
    hosted = Hosted()
    await hosted.instance.submit(hosted.away, submit("early", [1]))
    async with hosted:
        await hosted.instance.submit(hosted.away, submit("long", [1] * 600))
        early, long = hosted.away.lost
        assert (early.request_ids, early.retry) == (["early"], True)
        assert (long.request_ids, long.retry) == (["long"], False)
        assert "512" in long.reason
        assert len(hosted.instance.requests) == 0
        hosted.engine.model.check()


@on_loop
async def test_a_death_is_told_to_each_origin_once() -> None:
    async with Hosted() as hosted:
        reasons = hosted.deaths
        await hosted.instance.submit(hosted.home, submit("r1", [1], epoch=3))
        await hosted.instance.submit(hosted.away, submit("r2", [2], epoch=4))
        await hosted.steps(1)
        hosted.engine.die("instance a-0 died: out of memory")
        assert [(f.request_ids, f.epochs, f.retry) for f in hosted.home.lost] == [
            (["r1"], [3], True)
        ]
        assert [(f.request_ids, f.epochs) for f in hosted.away.lost] == [(["r2"], [4])]
        assert reasons == ["instance a-0 died: out of memory"]
        assert len(hosted.instance.requests) == 0
        await hosted.instance.submit(hosted.away, submit("r3", [3]))
        assert hosted.away.lost[-1].request_ids == ["r3"]
        assert hosted.away.lost[-1].reason == reasons[0]


@on_loop
async def test_evicting_one_origin_leaves_the_others() -> None:
    async with Hosted() as hosted:
        await hosted.instance.submit(hosted.home, submit("r1", [1]))
        await hosted.instance.submit(hosted.away, submit("r2", [2] * 100))
        await hosted.steps(1)
        await hosted.instance.evict(hosted.away)
        assert len(hosted.instance.requests) == 1
        assert list(hosted.engine.model.held()) == ["r1"]
        await hosted.steps(3)
        assert [p for _, p, _ in hosted.home.got("r1")] == [0, 1, 2, 3]
        assert len(hosted.away.got("r2")) == 1


@on_loop
async def test_outputs_behind_a_cancellation_go_nowhere() -> None:
    async with Hosted() as hosted:
        await hosted.instance.submit(hosted.home, submit("r1", [1]))
        await soon(lambda: hosted.gate.waiting)
        await hosted.instance.cancel(["r1", "unknown"])
        hosted.gate.open()
        await soon(lambda: hosted.home.stats)
        assert hosted.home.got("r1") == []


@on_loop
async def test_a_cancellation_of_two_epochs_ends_what_runs_in_either() -> None:
    """A frame may have outputs of both, and nobody wants them; the order says nothing."""
    async with Hosted() as hosted:
        await hosted.instance.submit(hosted.home, submit("r1", [1], epoch=2))
        await hosted.instance.cancel(["r1"], [1])
        assert len(hosted.instance.requests) == 1
        await hosted.instance.cancel(["r1", "r1"], [2, 1])
        assert hosted.instance.requests == []
        hosted.gate.open()


@on_loop
async def test_a_request_that_comes_again_in_a_newer_epoch_starts_over() -> None:
    """Its API server has seen the link break and dialled again before this node noticed."""
    async with Hosted() as hosted:
        anew = Recorder("b")
        await hosted.instance.submit(hosted.away, submit("r1", [1, 2], epoch=1))
        await hosted.steps(2)
        await hosted.instance.submit(anew, submit("r1", [1, 2], epoch=2))
        await hosted.instance.evict(hosted.away)
        assert anew.lost == [] and len(hosted.instance.requests) == 1
        hosted.gate.open()
        await soon(lambda: not hosted.instance.requests)
        tokens = answer([1, 2], 4)
        assert anew.got("r1") == [(2, n, [tokens[n]]) for n in range(4)]
        hosted.engine.model.check()
        assert not hosted.engine.model.has_work


class RefusingEngine:
    """An engine that comes up and then takes nothing."""

    id = "a-0"

    async def start(self, events: EngineEvents) -> EngineFacts:
        return EngineFacts(64, 16, 512, ("generate",))

    async def add(self, request: Any, generated: Sequence[int] = ()) -> None:
        raise EngineError("not today")

    async def abort(self, request_ids: list[str]) -> None:
        raise AssertionError("there is nothing to abort")

    async def call(self, method: str, *args: Any) -> Any:
        raise EngineError("not today")

    async def stop(self, timeout: float) -> None:
        pass


@on_loop
async def test_an_engine_that_cannot_resume_is_given_nothing_that_has_begun() -> None:
    async with Hosted() as hosted:
        assert hosted.instance.facts is not None
        hosted.instance.facts = replace(hosted.instance.facts, resumes=False)
        request = core_request("r1", [1, 2])
        await hosted.instance.submit(hosted.home, Submit("a-0", 2, 1, request, [11]))
        (lost,) = hosted.home.lost
        assert lost.request_ids == ["r1"] and lost.retry and NO_RESUME in lost.reason
        assert len(hosted.instance.requests) == 0


@pytest.mark.parametrize("steps", [0, TRIAL_TOKENS])
@on_loop
async def test_suspects_that_are_on_trial_together_are_told_so(steps: int) -> None:
    """After a few tokens none of them is on trial any more."""
    async with Hosted() as hosted:
        for origin, name in ((hosted.home, "h"), (hosted.away, "f")):
            request = core_request(name, [1, 2], 20)
            await hosted.instance.submit(origin, Submit("a-0", 3, 1, request, [11], suspect=True))
        await hosted.instance.submit(hosted.away, submit("innocent", [3, 4], 20))
        await hosted.steps(steps)
        hosted.engine.die("a-0 died")
        (home,), (away, innocent) = hosted.home.lost, hosted.away.lost
        assert home.died and away.died and innocent.died
        assert (home.together, away.together, innocent.together) == (not steps, not steps, False)


@on_loop
async def test_the_metrics_of_a_dead_engine_show_nothing_that_runs() -> None:
    async with Hosted() as hosted:
        await hosted.instance.submit(hosted.away, submit("r1", [1, 2], 20))
        await hosted.steps(1)
        assert hosted.home.running == 1
        hosted.engine.die("a-0 died")
        assert hosted.home.running == 0 and hosted.instance.load().used_blocks == 0


@on_loop
async def test_an_exception_is_owed_to_what_its_step_began_with() -> None:
    """Not to what had got through a step before, nor to what still waits."""
    async with Hosted() as hosted:
        await hosted.instance.submit(hosted.home, submit("old", [1, 2], 20))
        await hosted.steps(1)
        await soon(lambda: hosted.gate.waiting)
        for name in ("r1", "r2"):
            await hosted.instance.submit(hosted.away, submit(name, [3, 4], 20))
        step = frozenset({"old", "r1"})
        hosted.instance._lose_all("a-0 died", Death("a-0 died", "RuntimeError", step))
        (old,), (r1, r2) = hosted.home.lost, hosted.away.lost
        assert (r1.fault, r1.alone) == ("RuntimeError", True)
        assert (old.fault, old.alone, r2.fault, r2.alone) == ("", False, "", False)


@on_loop
async def test_two_nodes_with_a_request_of_the_same_name() -> None:
    async with Hosted() as hosted:
        await hosted.instance.submit(hosted.away, submit("r1", [1, 2]))
        await hosted.instance.submit(hosted.home, submit("r1", [3, 4]))
        (lost,) = hosted.home.lost
        assert not lost.retry and "of another node" in lost.reason
        await hosted.steps(4)
        assert [t for _, _, tokens in hosted.away.got("r1") for t in tokens] == answer([1, 2], 4)


@pytest.mark.parametrize(("generated", "told"), [([], 2), ([11], 1)])
@on_loop
async def test_a_request_that_has_moved_here_was_queued_elsewhere(
    generated: list[int], told: int
) -> None:
    """vLLM's metrics take the time in the queue from the first time it was in one."""
    async with Hosted() as hosted:
        request = core_request("r1", [1, 2])
        await hosted.instance.submit(hosted.home, Submit("a-0", 1, 1, request, generated))
        kinds = (EngineCoreEventType.QUEUED, EngineCoreEventType.PREEMPTED)
        output = EngineCoreOutput("r1", [12], events=[EngineCoreEvent(k, 1.0) for k in kinds])
        hosted.instance._on_outputs(EngineCoreOutputs(outputs=[output]))
        assert hosted.instance.load().preemptions == 1
        assert output.events is not None and len(output.events) == told
        await hosted.instance.cancel(["r1"])


@on_loop
async def test_a_refused_request_leaves_nothing() -> None:
    home = Recorder("a")
    hosted = HostedInstance(RefusingEngine(), lambda: home, on_load=lambda: None)
    await hosted.start(on_death=lambda reason: None)
    await hosted.submit(home, submit("r1", [1]))
    assert len(hosted.requests) == 0
    assert [(f.reason, f.retry) for f in home.lost] == [("not today", False)]


@on_loop
async def test_a_request_that_cannot_be_sent_leaves_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an engine raises, its origin gets an answer."""

    async def add(self: Any, request: Any, generated: Sequence[int]) -> None:
        raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(RefusingEngine, "add", add)
    home = Recorder("a")
    hosted = HostedInstance(RefusingEngine(), lambda: home, on_load=lambda: None)
    await hosted.start(on_death=lambda reason: None)
    await hosted.submit(home, submit("r1", [1]))
    assert len(hosted.requests) == 0
    assert [(f.request_ids, f.retry) for f in home.lost] == [(["r1"], False)]
    assert "surrogates not allowed" in home.lost[0].reason
    assert "instance a-0 cannot take request 'r1'" in caplog.messages


@on_loop
async def test_a_stop_gives_back_what_still_runs() -> None:
    async with Hosted() as hosted:
        await hosted.instance.submit(hosted.home, submit("r1", [1], epoch=3))
        await hosted.instance.submit(hosted.away, submit("r2", [2]))
        await hosted.instance.stop(1.0)
        await hosted.instance.submit(hosted.away, submit("late", [3]))
        assert [(f.request_ids, f.epochs) for f in hosted.home.lost] == [(["r1"], [3])]
        assert [f.request_ids for f in hosted.away.lost] == [["r2"], ["late"]]
        for lost in hosted.home.lost + hosted.away.lost:
            assert (lost.reason, lost.retry) == ("instance a-0 has stopped", True)
        assert len(hosted.instance.requests) == 0


@on_loop
async def test_an_origin_that_is_gone_is_forgotten() -> None:
    async with Hosted() as hosted:
        anew = Recorder("b")
        await hosted.instance.submit(hosted.away, submit("r1", [1], sequence=7))
        await hosted.instance.submit(anew, submit("r2", [1], sequence=9))
        await hosted.instance.evict(hosted.away)
        assert hosted.instance.load().received == {"b": 9}, "by its new link"
        await hosted.instance.evict(anew)
        assert hosted.instance.load().received == {}


@on_loop
async def test_a_cancellation_while_the_engine_takes_the_request() -> None:
    home, adding = Recorder("a"), asyncio.Event()
    engine = IdleEngine("a-0", adding=adding)
    hosted = HostedInstance(engine, lambda: home, on_load=lambda: None)
    await hosted.start(on_death=lambda reason: None)
    submitting = asyncio.create_task(hosted.submit(home, submit("r1", [1])))
    await soon(lambda: hosted.requests)
    await hosted.cancel(["r1"])
    adding.set()
    await submitting
    assert engine.requests == [] and len(hosted.requests) == 0 and home.frames == []


@pytest.mark.parametrize("tokens, blocks", [(15, 1), (16, 2), (1, 1)])
def test_a_prompt_asks_for_the_blocks_of_its_first_step(tokens: int, blocks: int) -> None:
    """The prompt, and the token that its prefill makes."""

    @on_loop
    async def check() -> None:
        async with Hosted() as hosted:
            await hosted.instance.submit(hosted.home, submit("r1", [1] * tokens))
            assert hosted.instance.load().waiting_blocks == blocks

    check()


@on_loop
async def test_the_load_tells_priorities_and_what_is_to_be_prefilled() -> None:
    async with Hosted() as hosted:
        for name, prompt, priority in (("r1", 20, -1), ("r2", 30, 0), ("r3", 10, -1)):
            request = core_request(name, [1] * prompt, 8, priority)
            await hosted.instance.submit(hosted.home, Submit("a-0", 1, 1, request))
        load = hosted.instance.load()
        assert (load.prefill_tokens, load.priorities) == (60, {-1: 2})
        await hosted.steps(1)
        resumed = core_request("r4", [1] * 10, 8, 5)
        await hosted.instance.submit(hosted.away, Submit("a-0", 3, 2, resumed, [7] * 4))
        load = hosted.instance.load()
        assert (load.prefill_tokens, load.priorities) == (14, {-1: 2, 5: 1})
        hosted.gate.open()
        await soon(lambda: not hosted.instance.requests)
        assert (hosted.instance.load().prefill_tokens, hosted.instance.load().priorities) == (0, {})
