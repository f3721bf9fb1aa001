"""What is put around vLLM changes no answer."""

import json
from typing import Any

import pytest
from starlette.responses import JSONResponse
from vllm.v1.engine import logprobs

from llumnix.engine.vllm import compat


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a node, and for a test alone."""
    monkeypatch.setattr(JSONResponse, "render", JSONResponse.render)
    convert = logprobs.convert_ids_list_to_tokens
    monkeypatch.setattr(logprobs, "convert_ids_list_to_tokens", convert)
    compat.answer_quickly()


@pytest.mark.parametrize(
    "content",
    [
        {"text": "Fuß \u2028 \U0001f600 \x00", "logprobs": [-0.5, 1e-7, -9999.0, None, True]},
        {1: {"2": 3.0}, "nested": [[], {}]},
        {"large": 2**70},
    ],
)
def test_answers_are_the_same_json(content: Any) -> None:
    said = json.loads(JSONResponse(content).body)
    assert said == json.loads(json.dumps(content))


def test_a_text_of_a_token_is_looked_up_once() -> None:
    class Tokenizer:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def decode(self, ids: list[int]) -> str:
            self.asked += ids
            return f"<{ids[0]}>"

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"<{i}>" for i in ids]

    tokenizer = Tokenizer()
    convert = logprobs.convert_ids_list_to_tokens
    expected = ["<7>", "<8>", "<7>"]
    assert convert(tokenizer, [7, 8, 7]) == expected  # type: ignore[arg-type]
    asked = len(tokenizer.asked)
    assert convert(tokenizer, [7, 8, 7]) == expected  # type: ignore[arg-type]
    assert len(tokenizer.asked) == asked
    assert convert(tokenizer, []) == []  # type: ignore[arg-type]
