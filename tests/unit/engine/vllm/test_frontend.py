"""What the door in vLLM's frontend refuses, whatever route it has come by."""

from argparse import Namespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams

from llumnix.engine.vllm.frontend import DoorLLM
from tests.kit.loop import on_loop


def door() -> DoorLLM:
    llm = DoorLLM.__new__(DoorLLM)
    llm.model_config = Namespace(max_model_len=4096, get_vocab_size=lambda: 50_000)
    return llm


@pytest.mark.parametrize(
    ("tokens", "logprobs", "n"), [(4096, 20, 1), (1000, 20, 8), (17_000, 1, 1), (2, -1, 1)]
)
@on_loop
async def test_more_logprobs_of_prompts_than_one_answer_may_have(
    tokens: int, logprobs: int, n: int
) -> None:
    params = SamplingParams(prompt_logprobs=logprobs, n=n, temperature=1.0)
    with pytest.raises(Exception, match="more than the 32768 that one answer may have"):
        await door().add_request("r", {"prompt_token_ids": [1] * tokens}, params)


@pytest.mark.parametrize(("tokens", "logprobs"), [(4096, 1), (4096, 7), (1500, 20), (9000, None)])
def test_what_evaluations_ask_for(tokens: int, logprobs: int | None) -> None:
    prompt: Any = {"prompt_token_ids": [1] * tokens}
    door()._check_logprobs(prompt, SamplingParams(prompt_logprobs=logprobs, logprobs=logprobs))


@pytest.mark.parametrize(
    ("size", "count", "fine"), [(100, 3, True), (20, 100, True), (4000, 2, False), (200, 2, False)]
)
@on_loop
async def test_a_search_for_repetitions_that_would_hold_an_engine_up(
    size: int, count: int, fine: bool
) -> None:
    detection = RepetitionDetectionParams(max_pattern_size=size, min_count=count)
    params = SamplingParams(repetition_detection=detection)
    # What is fine goes on to vLLM's own, which this door has not.
    expected = AttributeError if fine else Exception
    with pytest.raises(expected, match="_turns" if fine else "max_pattern_size"):
        await door().add_request("r", {"prompt_token_ids": [1]}, params)
