"""What the door in vLLM's frontend refuses, whatever route it has come by."""

from argparse import Namespace
from typing import Any

import pytest
from vllm import SamplingParams

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
