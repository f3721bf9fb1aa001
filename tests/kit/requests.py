"""Requests as vLLM's frontend makes them, and the tokens that a modelled engine answers with."""

from collections.abc import Sequence

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from llumnix.engine.sim.request import stream_seed, token_at

VOCABULARY, END = 32_000, 2  # of ModelConfig, unless a test says otherwise


def core_request(
    name: str, prompt: Sequence[int], max_tokens: int = 8, priority: int = 0
) -> EngineCoreRequest:
    """A request for exactly `max_tokens` tokens, whatever the model says."""
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(prompt),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        priority=priority,
    )


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What a modelled engine generates for the prompt."""
    seed = stream_seed(list(prompt))
    return [token_at(seed, n, VOCABULARY, (END,)) for n in range(count)]
