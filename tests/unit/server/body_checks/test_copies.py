"""What a request's parameters cost for each of its prompts and choices."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from llumnix.server.body_checks.fields import weigh
from llumnix.server.body_checks.numbers import MANY, whole
from llumnix.server.errors import BadContent

P512 = ["x"] * 512
WORDS = [f"w{n:04}" for n in range(60)]
SCHEMA = {"properties": {f"key{n}": {"type": "string", "title": "Key"} for n in range(100)}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"prompt": ["x"] * 16, "n": 64, "vllm_xargs": {"a": [1] * 16_000}}, "vllm_xargs"),
        ({"prompt": P512, "vllm_xargs": {"a": "x" * 200_000}}, "vllm_xargs"),
        ({"prompt": P512, "allowed_token_ids": [1] * 16_000}, "allowed_token_ids"),
        ({"prompt": P512, "logit_bias": {str(n): 1.0 for n in range(1024)}}, "logit_bias"),
        ({"prompt": P512, "bad_words": WORDS}, "bad_words"),
        ({"prompt": P512, "stop_token_ids": [1] * 1024}, "stop_token_ids"),
        ({"prompt": P512, "stop": ["y" * 250] * 64, "n": 8}, "stop"),
        ({"prompt": P512, "structured_outputs": {"regex": "x" * 100_000}}, "structured_outputs"),
        ({"prompt": P512, "kv_transfer_params": {"a": [[1]] * 4000}}, "kv_transfer_params"),
        ({"prompt": P512, "of_a_newer_vllm": {"a": [1] * 4000}}, "of_a_newer_vllm"),
        ({"prompt": P512, "user_name": "x" * 100_000}, "user_name"),
        (
            {"token_ids": [1], "sampling_params": {"n": 64, "extra_args": {"a": [1] * 9000}}},
            "extra_args",
        ),
        ({"messages": [[{}]] * 512, "tools": [TOOL]}, "tools"),
        ({"messages": [{}], "n": 64, "tools": [TOOL] * 20, "tool_choice": "required"}, "tools"),
    ],
)
def test_what_is_too_much_for_so_many(said: dict[str, Any], field: str | None) -> None:
    with pytest.raises(BadContent, match=r"is too much for \d+ requests in one") as caught:
        weigh(said)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "said",
    [
        {"prompt": "x", "allowed_token_ids": [1] * 16_000, "vllm_xargs": {"a": [1] * 16_000}},
        {"prompt": "x", "logit_bias": {str(n): 1.0 for n in range(1024)}, "bad_words": WORDS},
        {"prompt": P512, "n": 4, "stop": ["\n", "END", "###", "</s>"], "logit_bias": {"5": -100}},
        {"prompt": P512, "bad_words": WORDS[:20], "temperature": 0.5, "user": "a user"},
        {
            "messages": [[{"role": "user", "content": "word " * 200}]] * 512,
            "response_format": FORMAT,
        },
        {"messages": [{"role": "user", "content": "word " * 9000}], "n": 64, "tools": [TOOL] * 30},
        {"prompt": [[5] * 1000] * 64, "vllm_xargs": {"a": [1] * 1000}},
        {"token_ids": [5] * 60_000, "sampling_params": {"n": 8, "extra_args": {"a": [1] * 99}}},
        {"query": "x", "documents": ["word " * 300] * 2000, "model": "m" * 99},
    ],
)
def test_what_honest_clients_ask_for(said: dict[str, Any]) -> None:
    began = time.thread_time()
    weigh(said)
    assert time.thread_time() - began < 0.1  # a millisecond, on a machine of one's own


INT = TypeAdapter(int)


@settings(max_examples=1000, deadline=None)
@given(
    st.text(alphabet="0123456789_+-. \t\u00a0", max_size=12)
    | st.from_regex(r"\A[ ]{0,3}[+]?[0_]{0,90}[0-9][0-9_]{0,5}([.]0{0,90})?[ ]{0,3}\Z")
    | st.floats()
    | st.integers()
    | st.booleans()
    | st.text()
)
def test_a_number_counts_for_what_a_model_makes_of_it(said: Any) -> None:
    counted = whole(said)
    assert 1 <= counted <= MANY
    try:
        taken = INT.validate_python(said)
    except ValidationError:
        return
    assert counted >= min(taken, MANY), json.dumps(said)


@pytest.mark.parametrize("zeros", [30, 10_000, 4_000_000])
def test_zeros_before_a_number_do_not_hide_it(zeros: int) -> None:
    assert whole("0" * zeros + "16384") == 16384
    assert whole(" +" + "0_" * zeros + "200 ") == 200
    assert whole("64." + "0" * zeros) == 64
    assert whole("1" * zeros) > 64 and whole("no number " * 9) == 1
