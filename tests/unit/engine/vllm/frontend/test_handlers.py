"""What the door in vLLM's frontend refuses, whatever route it has come by."""

from argparse import Namespace
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from llumnix.engine.vllm.frontend.handlers import DoorLLM
from llumnix.engine.vllm.grammars.time_limit import SLOW
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


def ending(
    monkeypatch: pytest.MonkeyPatch, finish: str, stop_reason: str | None = None
) -> list[str]:
    """Has vLLM's AsyncLLM end requests so; what has become of them is in the list."""
    ends: list[str] = []

    async def generate(self: AsyncLLM, *_: Any) -> AsyncGenerator[RequestOutput, None]:
        try:
            for tokens, reason in (([1], None), ([1, 0], finish)):
                parts: dict[str, Any] = {"cumulative_logprob": None, "logprobs": None}
                choice = CompletionOutput(
                    0, "", tokens, **parts, finish_reason=reason, stop_reason=stop_reason
                )
                yield RequestOutput("r", None, [7], None, [choice], reason is not None)
        finally:
            ends.append("closed")

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    return ends


@pytest.mark.parametrize(
    "forbidding", [{"allowed_token_ids": [5]}, {"bad_words": ["a"]}, {"min_tokens": 9}]
)
@on_loop
async def test_a_grammar_that_is_left_no_token_is_its_clients_fault(
    monkeypatch: pytest.MonkeyPatch, forbidding: dict[str, Any]
) -> None:
    ends = ending(monkeypatch, "error")
    grammar = StructuredOutputsParams(regex="a+")
    params = SamplingParams(structured_outputs=grammar, **forbidding)
    (name,), seen = forbidding, 0
    with pytest.raises(VLLMValidationError, match=f"{name} and the grammar or schema together"):
        async for _ in door().generate({}, params, "r"):
            seen += 1
    assert seen == 1 and ends == ["closed"]


@pytest.mark.parametrize("other", [{}, {"min_tokens": 9}])
@on_loop
async def test_a_grammar_that_takes_an_engine_too_long_is_its_clients_fault(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    ends = ending(monkeypatch, "error", SLOW)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"), **other)
    with pytest.raises(VLLMValidationError, match="takes too long to follow"):
        async for _ in door().generate({}, params, "r"):
            pass
    assert ends == ["closed"]


@pytest.mark.parametrize("params", [{"min_tokens": 9}, {"structured_outputs": {"regex": "a"}}])
@on_loop
async def test_other_errors_are_the_servers(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    ending(monkeypatch, "error")
    if grammar := params.get("structured_outputs"):
        params = {"structured_outputs": StructuredOutputsParams(**grammar)}
    last = [output async for output in door().generate({}, SamplingParams(**params), "r")][-1]
    assert last.outputs[0].finish_reason == "error"


@on_loop
async def test_what_has_room_goes_on_and_ends_with_its_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = ending(monkeypatch, "stop")
    grammar = StructuredOutputsParams(regex="a+")
    params = SamplingParams(structured_outputs=grammar, min_tokens=1)
    assert len([output async for output in door().generate({}, params, "r")]) == 2
    left = door().generate({}, params, "r")
    await anext(left)
    await left.aclose()
    assert ends == ["closed"] * 2
