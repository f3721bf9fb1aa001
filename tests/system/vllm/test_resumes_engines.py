"""Requests resumed in engines that are configured otherwise."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import ReasoningConfig
from vllm.lora.request import LoRARequest
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import StructuredOutputsParams

from llumnix.engine.base import EngineError
from llumnix.engine.vllm import scheduler
from tests.kit import aloud
from tests.kit.plugged import EveryThird, make_adapter
from tests.kit.resumes import Bench, Result
from tests.kit.sampling import CASES, GREEDY, PERSON, RANDOM, params
from tests.kit.tails import Whole, different, resume_all, run_whole, salted, story

pytestmark = pytest.mark.vllm

COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2, 3, 4, 5, 6, 7,"
STATEFUL = ("seed", "penalties and seed", "min_tokens", "bad_words", "logprobs", "json", "regex")


@contextmanager
def _engine(model: str, folder: Path, **options: Any) -> Iterator[Bench]:
    ahead = options.pop("one_step_ahead", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        bench = Bench(model, folder, block_size=32, **options)
        if ahead:  # vLLM turns it off on a CPU, where it gains nothing but works
            bench.config.scheduler_config.async_scheduling = True
            bench.config.scheduler_config.scheduler_cls = None
            bench.config.parallel_config.worker_extension_cls = ""
            assert scheduler.install(bench.config)
        bench.start()
    try:
        yield bench
    finally:
        bench.close()


def _check(bench: Bench, wholes: dict[str, Whole]) -> None:
    for name, tails in resume_all(bench, wholes).items():
        for position, tail in tails:
            assert not different(wholes[name], position, tail), name
    assert bench.do(bench.engine.blocks.books())["requests"] == 0


def test_without_a_prefix_cache_and_with_prefills_in_chunks(model: str, tmp_path: Path) -> None:
    options = {"enable_prefix_caching": False, "max_num_batched_tokens": 48, "max_num_seqs": 16}
    options |= {"scheduling_policy": "priority"}
    with _engine(model, tmp_path, **options) as bench:
        cases = {name: params(CASES[name]) for name in STATEFUL}
        more = {name: {"priority": n % 3} for n, name in enumerate(cases)}
        wholes = run_whole(bench, cases, seed=3, more=more)
        _check(bench, wholes)
        books = bench.do(bench.engine.blocks.books())
        assert books["free"] == books["total"]


def test_with_asynchronous_scheduling(model: str, tmp_path: Path) -> None:
    with _engine(model, tmp_path, one_step_ahead=True) as bench:
        assert str(bench.config.scheduler_config.scheduler_cls).endswith("MovingAsyncScheduler")
        cases = {name: params(CASES[name]) for name in STATEFUL}
        _check(bench, run_whole(bench, cases, seed=7))


def test_preempted_while_its_blocks_are_held(model: str, tmp_path: Path) -> None:
    """The one that came last is preempted: its copy is given up, and all go on as they would."""
    draw = random.Random(9)
    with _engine(model, tmp_path, num_gpu_blocks_override=10, max_model_len=256) as bench:
        blocks = bench.engine.blocks
        requests = [bench.request(story(draw, 50), params(RANDOM, max_tokens=60)) for _ in range(3)]
        alone = [bench.run(salted(request)) for request in requests]

        async def together() -> list[Result]:
            results = [await bench._add(salted(request), ()) for request in requests]
            last = list(bench._results)[-1]
            while not results[-1].steps:
                await asyncio.sleep(0.01)
            assert await blocks.export("one", last)
            with pytest.raises(EngineError, match="was preempted"):
                while not results[-1].done.is_set():
                    await blocks.export("one", last)
                    await asyncio.sleep(0.02)
            await blocks.drop("one")
            assert await blocks.export("two", last) == [], "it waits, and has no blocks to move"
            await blocks.drop("two")
            for result in results:
                await result.done.wait()
            return results

        results = bench.do(together())
        assert [r.tokens for r in results] == [r.tokens for r in alone]
        books = bench.do(blocks.books())
        assert books["free"] == books["total"] and not books["held"] and not books["requests"]


def test_with_speculative_decoding(model: str, tmp_path: Path) -> None:
    """Greedy is exact; with a seed the first step of a resume has no drafts and draws otherwise."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with _engine(model, tmp_path, speculative_config=ngram) as bench:
        cases = {
            "greedy": params(GREEDY, max_tokens=40),
            "penalties": params(GREEDY, frequency_penalty=0.2, repetition_penalty=1.05),
            "min_tokens": params(CASES["min_tokens"]),
            "logprobs": params(GREEDY, logprobs=2),
            "regex": params(
                GREEDY, structured_outputs=StructuredOutputsParams(regex=r"( \d+,){9}")
            ),
        }
        wholes = run_whole(bench, cases, seed=4, prompts=dict.fromkeys(cases, COUNTING))
        greedy = wholes["greedy"].result
        assert greedy.steps < len(greedy.tokens), "drafts were accepted"
        _check(bench, wholes)
        seeded = run_whole(bench, {"seed": params(RANDOM)}, 5, {"seed": COUNTING})["seed"]
        begun = seeded.result.tokens[:9]
        # Which drafts there are, and so how often it is drawn, may hang on a rounding.
        again = bench.run(salted(seeded.request), begun)
        assert len(begun) + len(again.tokens) == len(seeded.result.tokens)


def test_with_an_adapter_a_logits_processor_and_reasoning(model: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "logits_processors": [EveryThird],
        "reasoning_parser": "aloud",
        "reasoning_parser_plugin": aloud.__file__,
        "reasoning_config": ReasoningConfig(
            reasoning_parser="aloud",
            reasoning_start_str=aloud.START,
            reasoning_end_str=aloud.END,
        ),
    }
    ReasoningParserManager.import_reasoning_parser(aloud.__file__)  # as a node does
    adapter = LoRARequest("own", 1, make_adapter(model, tmp_path / "adapter"))
    with _engine(model, tmp_path, **options) as bench:
        cases: dict[str, SamplingParams] = {
            "logits processor": params(RANDOM, extra_args={"third": 260}),
            "thinking_token_budget": params(RANDOM, thinking_token_budget=9),
            "thought": params(
                RANDOM,
                thinking_token_budget=9,
                max_tokens=40,
                structured_outputs=StructuredOutputsParams(json=PERSON),
            ),
            "none": params(GREEDY),
        }
        prompts = {name: "Think about the king:\n~" for name in cases}
        thinking = {"chat_template_kwargs": {"thinking": True}}
        more = {"thought": {"reasoning_parser_kwargs": thinking}}
        wholes = run_whole(bench, cases, seed=6, prompts=prompts, more=more)
        # Alone: on a CPU vLLM applies an adapter to all requests of a batch.
        own = {"adapter": {"lora_request": adapter}}
        only = run_whole(bench, {"adapter": params(GREEDY)}, 6, {"adapter": prompts["none"]}, own)
        _check(bench, only)
        wholes |= only
        told = {name: whole.result.tokens for name, whole in wholes.items()}
        assert told["adapter"] != told["none"]
        assert told["logits processor"][2::3] == [260] * 8
        end = bench.inputs.tokenizer.encode(aloud.END)[0]
        for name in ("thinking_token_budget", "thought"):
            assert told[name].index(end) == 9, told[name]
        text = bench.inputs.tokenizer.decode(told["thought"])
        assert text.partition(aloud.END)[2].lstrip().startswith("{"), text
        del wholes["adapter"]
        _check(bench, wholes)
