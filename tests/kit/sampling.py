"""Sampling parameters, each of them at work in a request of its own."""

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "born": {"type": "integer"},
        "towns": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "born", "towns"],
    "additionalProperties": False,
}
SUMS = r"""
root ::= sum ("; " sum){5}
sum ::= number " + " number " = " number
number ::= [1-9] [0-9] [0-9]?
"""
TAGS = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<person>"],
        "tags": [
            {
                "begin": "<person>",
                "content": {"type": "json_schema", "json_schema": PERSON},
                "end": "</person>",
            }
        ],
        "at_least_one": True,
        "stop_after_first": True,
    },
}

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
RANDOM: dict[str, Any] = {"temperature": 1.0, "seed": 17, "ignore_eos": True}


def _output(**structure: Any) -> dict[str, Any]:
    return {
        "temperature": 0.8,
        "seed": 3,
        "max_tokens": 60,
        "structured_outputs": StructuredOutputsParams(**structure),
    }


# What the engine does with them; stop strings and the like are the frontend's.
CASES: dict[str, dict[str, Any]] = {
    "temperature 0": GREEDY,
    "seed": RANDOM,
    "temperature": RANDOM | {"temperature": 1.7},
    "top_k": RANDOM | {"top_k": 5},
    "top_p": RANDOM | {"top_p": 0.8},
    "min_p": RANDOM | {"min_p": 0.05},
    "top_k, top_p and min_p": RANDOM | {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "presence_penalty": GREEDY | {"presence_penalty": 1.5},
    "frequency_penalty": GREEDY | {"frequency_penalty": 0.8},
    "repetition_penalty": GREEDY | {"repetition_penalty": 1.3},
    "penalties and seed": RANDOM
    | {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    # The comma would stop it at once.
    "min_tokens": GREEDY | {"min_tokens": 15, "stop_token_ids": [28, 30, 198, 29, 260, 284]},
    "max_tokens": GREEDY | {"max_tokens": 7},
    "ignore_eos": RANDOM | {"ignore_eos": False, "logit_bias": {2: 9.0}},
    "stop_token_ids": RANDOM | {"stop_token_ids": [30]},
    "bad_words": GREEDY | {"bad_words": [" the", " and", " of", " a", " to be"]},
    "logit_bias": GREEDY | {"logit_bias": {260: -100.0, 284: 4.0, 28: -3.0}},
    "allowed_token_ids": RANDOM | {"allowed_token_ids": list(range(200, 2000))},
    "logprobs": RANDOM | {"logprobs": 5},
    "logprobs of all": GREEDY | {"logprobs": 0, "max_tokens": 20},
    "prompt_logprobs": GREEDY | {"prompt_logprobs": 2},
    "flat_logprobs": GREEDY | {"logprobs": 2, "flat_logprobs": True},
    "repetition_detection": GREEDY
    | {
        "allowed_token_ids": [28, 260],
        "repetition_detection": RepetitionDetectionParams(
            max_pattern_size=3, min_pattern_size=1, min_count=12
        ),
    },
    "skip_reading_prefix_cache": GREEDY | {"skip_reading_prefix_cache": True},
    "extra_args": RANDOM | {"extra_args": {"somebody": "else's"}},
    "json": _output(json=PERSON),
    "regex": _output(regex=r"([A-Z][a-z]{2,8}, ){8}end"),
    "choice": _output(choice=["a long and winding road", "a long and winding river of stones"]),
    "grammar": _output(grammar=SUMS),
    "json_object": _output(json_object=True),
}

# All others in a batch with such a request get only these logprobs from vLLM: it runs alone.
ALONE: dict[str, dict[str, Any]] = {
    "logprob_token_ids": GREEDY | {"logprob_token_ids": [28, 260, 284]},
}


def params(case: dict[str, Any], **more: Any) -> SamplingParams:
    """The sampling parameters of a case, with an end at 24 tokens unless it says otherwise."""
    return SamplingParams(**({"max_tokens": 24} | case | more))
