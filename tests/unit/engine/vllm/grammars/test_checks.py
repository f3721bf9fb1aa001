"""Grammars on trial: what they may take, and what becomes of those that take more."""

import asyncio
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from llumnix.engine.vllm.grammars import checks as module
from llumnix.engine.vllm.grammars import trial as trials
from llumnix.engine.vllm.grammars.checks import Grammars
from llumnix.engine.vllm.grammars.trial import Trial, TrialFailed, TrialUnavailable
from tests.kit.hungry import FINE, Hungry
from tests.kit.loop import on_loop
from tests.kit.wait import eventually


def asking(**spec: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**spec))


def properties(number: int, required: bool = False) -> dict[str, Any]:
    names = [f"property_{n}" for n in range(number)]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    return schema | ({"required": names} if required else {})


@pytest.fixture(scope="module")
def config(model: str) -> VllmConfig:
    return AsyncEngineArgs(model=model, dtype="float32").create_engine_config()


class Scripted:
    """Stands for the process of a lane: what it answers, and how often it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, 0

    def run(self, params: StructuredOutputsParams) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def start(self) -> None: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


def scripted(answer: Any) -> tuple[Grammars, Scripted]:
    made, trial = Grammars(None, 1.0), Scripted(answer)  # type: ignore[arg-type]
    made._small.trial = made._large.trial = trial  # type: ignore[assignment]
    return made, trial


@pytest.mark.parametrize(
    "spec",
    [
        {"json": properties(20_000)},
        {"json": json.dumps(properties(20_000))},
        {"json": {f"{n}": 1 for n in range(5000)}},
        {"choice": [str(n) for n in range(200_000)]},
        {"choice": [str(n) for n in range(5000)]},
        {"regex": "a" * 300_000},
        {"grammar": "root ::= " + '"a" ' * 100_000},
        {"structural_tag": json.dumps({"structures": [{}] * 100_000})},
    ],
    ids=lambda spec: next(iter(spec)),
)
@on_loop
async def test_what_is_too_large_is_not_even_tried(spec: dict[str, Any]) -> None:
    grammars, trial = scripted(module.Verdict({}))
    with pytest.raises(VLLMValidationError, match="must have at most"):
        await grammars.admit(asking(**spec))
    assert trial.asked == 0
    await grammars.close()


@on_loop
async def test_a_verdict_is_kept_and_those_who_wait_share_it() -> None:
    grammars, trial = scripted(module.Verdict({"choice": None, "grammar": "root ::= 'a'"}))
    several = [asking(choice=["a"]) for _ in range(20)]
    await asyncio.gather(*map(grammars.admit, several))
    assert trial.asked == 1
    assert all(p.structured_outputs.grammar == "root ::= 'a'" for p in several)
    trial.answer = TrialFailed("too long")
    for _ in range(3):
        with pytest.raises(VLLMValidationError, match="too long"):
            await grammars.admit(asking(regex="(a+)+b"))
    assert trial.asked == 2
    await grammars.close()


@on_loop
async def test_what_the_machine_is_too_busy_for_is_no_verdict() -> None:
    grammars, trial = scripted(TrialUnavailable("busy"))
    for _ in range(2):
        with pytest.raises(GracefulHTTPError, match="busy") as caught:
            await grammars.admit(asking(choice=["a"]))
        assert caught.value.http_status == 503
    trial.answer = module.Verdict({})
    await grammars.admit(asking(choice=["a"]))
    assert trial.asked == 3
    await grammars.close()


@on_loop
async def test_a_client_that_leaves_takes_no_verdict_from_others() -> None:
    grammars, trial = scripted(module.Verdict({}))
    leaving, staying = (asyncio.create_task(grammars.admit(asking(regex="a"))) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await staying
    assert leaving.cancelled() and trial.asked == 1 and not grammars._trying
    await grammars.close()


@on_loop
async def test_what_nobody_waits_for_any_more_is_not_tried() -> None:
    """Else a client that sends and leaves would keep the process busy for minutes."""
    grammars, trial = scripted(module.Verdict({}))
    until = threading.Event()
    answer = trial.run

    def run(params: StructuredOutputsParams) -> Any:
        until.wait(10)
        return answer(params)

    trial.run = run  # type: ignore[method-assign]
    first = asyncio.create_task(grammars.admit(asking(regex="a")))
    leaving = [asyncio.create_task(grammars.admit(asking(regex=f"b{n}"))) for n in range(20)]
    staying, twice = (asyncio.create_task(grammars.admit(asking(regex=r))) for r in ("c", "b1"))
    await asyncio.sleep(0.05)
    for task in (first, *leaving):
        task.cancel()
    await asyncio.gather(*leaving, first, return_exceptions=True)
    assert grammars._small.waiting == len(grammars._trying) == 3, "one runs, and two are wanted"
    again = asyncio.create_task(grammars.admit(asking(regex="b2")))
    await asyncio.sleep(0)
    until.set()
    await asyncio.gather(staying, twice, again)
    assert trial.asked == 4 and grammars._small.waiting == 0 and not grammars._trying
    await grammars.close()


@on_loop
async def test_verdicts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, _ = scripted(module.Verdict({"grammar": "x" * 1000}))
    monkeypatch.setattr(module, "KEPT_BYTES", 20_000)
    for n in range(50):
        await grammars.admit(asking(regex=f"a{n}"))
    assert 0 < len(grammars._known) < 20 and grammars._bytes <= 20_000
    assert grammars._bytes == sum(size for _, size in grammars._known.values())
    await grammars.close()


@on_loop
async def test_too_many_that_wait_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, _ = scripted(module.Verdict({}))
    monkeypatch.setattr(module, "WAITING", 2)
    tasks = [asyncio.create_task(grammars.admit(asking(regex=f"a{n}"))) for n in range(3)]
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(d, "http_status", None) for d in done] == [None, None, 503]
    await grammars.close()


@on_loop
async def test_one_caller_has_half_of_the_places() -> None:
    """Else one fills the queue, and all others hear that too many wait."""
    grammars, _ = scripted(module.Verdict({}))

    async def admit(who: str, regex: str) -> None:
        module.asker.set(who)
        await grammars.admit(asking(regex=regex))

    many = [asyncio.create_task(admit("a", f"a{n}")) for n in range(module.WAITING)]
    shared = asyncio.create_task(admit("a", "a1"))  # one that waits already takes no place
    other = [asyncio.create_task(admit("b", f"b{n}")) for n in range(3)]
    done = await asyncio.gather(*many, return_exceptions=True)
    statuses = [getattr(d, "http_status", None) for d in done]
    assert statuses == [None] * module.SHARE + [503] * (module.WAITING - module.SHARE)
    await asyncio.gather(shared, *other)
    assert grammars._small.waiting == 0 and not grammars._small._waiting
    await admit("a", "a-again")
    await grammars.close()


@on_loop
async def test_what_no_client_wrote_is_not_tried() -> None:
    grammars, trial = scripted(module.Verdict({}))
    await grammars.admit(asking(json_object=True))
    await grammars.admit(SamplingParams())
    assert trial.asked == 0
    await grammars.close()


@pytest.fixture(scope="module")
def trial(config: VllmConfig) -> Iterator[Trial]:
    made = Trial(pickle.dumps(config), 2.0, memory=2**30)
    made.start()
    yield made
    made.close()


@on_loop
async def test_the_first_grammar_of_a_fresh_node(config: VllmConfig, trial: Trial) -> None:
    """It may take no longer than any other, and those behind it are compiled."""
    grammars = Grammars(config, 1.0)
    began = time.perf_counter()
    first = asyncio.create_task(grammars.admit(asking(regex="(.{1,1000}x){1,1000}")))
    await asyncio.sleep(0)
    behind = [asking(regex="[ab]{3}"), asking(choice=[f"{n:06}" for n in range(1000)])]
    others = asyncio.gather(*map(grammars.admit, behind))
    with pytest.raises(VLLMValidationError, match="longer than 1 s"):
        await first
    assert time.perf_counter() - began < 60.0, "2 s, on a machine of one's own"
    await others
    # What xgrammar makes little of is nothing to refuse.
    await grammars.admit(asking(regex="(a{1,1000}){1,1000}"))
    await grammars.close()


def test_a_process_that_hangs_says_nothing_of_its_grammar(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "STILL", 0.5)
    trial.start()
    began = time.perf_counter()
    os.kill(trial.pid or 0, signal.SIGSTOP)
    with pytest.raises(TrialUnavailable, match="too busy"):
        trial.run(asking(regex="[a-f]+").structured_outputs)
    assert time.perf_counter() - began < 35.0, "not forty seconds"
    assert trial.pid is None
    monkeypatch.setattr(trials, "STILL", 30.0)
    trial.run(asking(regex="[a-f]+").structured_outputs)


@pytest.mark.parametrize(
    "spec",
    [
        {"json": {"$ref": "#"}},
        {"grammar": 'root ::= root "a"'},
        {"grammar": 'root ::= "a" other\nother ::= other "b"'},
        {"json": {"type": "object", "minProperties": 10**9}},
        {"json": {"type": "object", "minProperties": 1000}},
        {"regex": "\\p{L}+"},
    ],
)
def test_what_an_engine_could_not_use_is_refused(trial: Trial, spec: dict[str, Any]) -> None:
    with pytest.raises(TrialFailed, match="can't be used"):
        trial.run(asking(**spec).structured_outputs)


@pytest.mark.parametrize(
    "grammar", ['root ::= root root | "#"', 'root ::= root root root | root root | "#"']
)
def test_a_grammar_whose_text_becomes_dearer_and_dearer_is_refused(
    trial: Trial, grammar: str
) -> None:
    with pytest.raises(TrialFailed, match="longer than 2 s to compile and to begin"):
        trial.run(asking(grammar=grammar).structured_outputs)


@pytest.mark.parametrize(
    "spec",
    [
        {"grammar": 'root ::= root "+" root | [0-9]+'},  # ambiguous, and in common use
        {"grammar": "root ::= item*\nitem ::= [a-z]+ ws\nws ::= [ \\t\\n]*"},
        {"json": {}},
        {"json": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "number"}]}}},
        {"regex": ".*"},
        {"regex": "( *a* *)*"},
    ],
)
def test_a_grammar_whose_text_is_long_is_none_the_worse(trial: Trial, spec: dict[str, Any]) -> None:
    trial.run(asking(**spec).structured_outputs)


@pytest.mark.parametrize(
    "spec",
    [
        {"grammar": 'root ::= ""'},
        {"regex": "a"},
        {"choice": ["a"]},
        {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}}},
        {"json": {"type": "object", "patternProperties": {"^a": {"type": "string"}}}},
        {"json": {"type": "number", "multipleOf": 2}},  # for which vLLM would choose another
    ],
)
def test_all_grammars_have_one_backend(trial: Trial, spec: dict[str, Any]) -> None:
    """An engine makes one, for the first grammar that it gets, and uses it for all others."""
    assert trial.run(asking(**spec).structured_outputs).changed["_backend"] == "xgrammar"


def test_a_process_compiles_refuses_and_dies(trial: Trial) -> None:
    """One test, as the process is dear to start: what is fine, wrong, or takes too long."""
    made = trial.run(asking(json=properties(3)).structured_outputs)
    assert made.changed["_backend"] == "xgrammar"
    began = time.perf_counter()
    choice = trial.run(asking(choice=["yes", "no"]).structured_outputs)
    assert time.perf_counter() - began < 5.0
    assert choice.changed["choice"] is None and "yes" in choice.changed["grammar"]
    for bad in ({"regex": "(["}, {"grammar": "root ::= ("}, {"json": '{"type": 1'}):
        with pytest.raises(TrialFailed) as caught:
            trial.run(asking(**bad).structured_outputs)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    first = trial.pid
    began = time.perf_counter()
    with pytest.raises(TrialFailed, match="longer than 2 s"):
        trial.run(asking(json=properties(20_000)).structured_outputs)
    assert time.perf_counter() - began < 40.0
    assert trial.pid is None
    eventually(lambda: not os.path.exists(f"/proc/{first}"), 5.0)
    trial.run(asking(regex="[a-z]+").structured_outputs)  # another process has taken its place
    os.kill(trial.pid or 0, 9)
    with pytest.raises(TrialUnavailable, match="cut off"):  # as by a machine without memory
        trial.run(asking(regex="[0-9]+").structured_outputs)
    trial.run(asking(regex="[0-9]+").structured_outputs)


def test_a_grammar_may_take_so_much_memory(config: VllmConfig) -> None:
    """The process ends of more, and the next grammar finds another."""
    trial = Trial(pickle.dumps(Hungry(config)), 10.0, memory=2**28)
    try:
        for regex in ("hungry", "bad_alloc"):
            with pytest.raises(TrialFailed, match="too much memory"):
                trial.run(asking(regex=regex).structured_outputs)
            assert trial.pid is None
        assert trial.run(asking(regex="[0-9]+").structured_outputs) == FINE
    finally:
        trial.close()


def test_a_process_that_is_ended_while_it_starts(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a node that stops before its fork server has imported everything."""
    starting, go_on = threading.Event(), threading.Event()
    context = trials.start_fork_server()

    def slowly() -> object:
        starting.set()
        assert go_on.wait(20.0)
        return context

    monkeypatch.setattr(trials, "start_fork_server", slowly)
    made = Trial(pickle.dumps(config), 2.0)
    failed: list[BaseException] = []

    def start() -> None:
        try:
            made.start()
        except TrialUnavailable as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    assert starting.wait(20.0)
    made.kill()
    go_on.set()
    thread.join(20.0)
    assert len(failed) == 1 and made.pid is None
