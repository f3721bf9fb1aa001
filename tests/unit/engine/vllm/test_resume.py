"""What a grammar has seen of a request that resumes is what it had seen where the request was."""

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.v1.structured_output import StructuredOutputManager

from llumnix.engine.vllm.resume import put_in_place

THINK, END, CALL, CALLED = 1, 2, 3, 4
WORDS = {"<think>": THINK, "</think>": END, "<tool_call>": CALL, "</tool_call>": CALLED}


class Tokenizer:
    """As much of one as a reasoning parser asks for."""

    def get_vocab(self) -> dict[str, int]:
        return WORDS

    def encode(self, text: str, **options: Any) -> list[int]:
        return [WORDS.get(text, 99)]


class Grammar:
    """Writes down what it has accepted."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.tokens += tokens
        return True


def manager(parser: str) -> Any:
    reasoner = ReasoningParserManager.get_reasoning_parser(parser)(Tokenizer())  # type: ignore[arg-type]
    found = SimpleNamespace(enable_in_reasoning=False, _get_reasoner=lambda request: reasoner)
    for name in ("_get_constraint_bounds", "accept_tokens"):
        setattr(found, name, MethodType(getattr(StructuredOutputManager, name), found))
    return found


def request(prompt: list[int], ended: bool | None, generated: list[int]) -> Any:
    grammar = Grammar()
    tokens = list(prompt)
    return SimpleNamespace(
        request_id="r1",
        prompt_token_ids=prompt,
        all_token_ids=tokens,
        use_structured_output=True,
        structured_output_request=SimpleNamespace(
            reasoning_ended=ended, grammar=grammar, _grammar=grammar
        ),
        sampling_params=SimpleNamespace(extra_args={"llumnix_generated": generated}),
        append_output_token_ids=tokens.extend,
        take_prefill_stats=lambda: None,
    )


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    ("prompt", "ended", "outputs"),
    [
        ([50, THINK], None, [10, 11, END, 12, 13]),
        ([50, THINK], None, [10, 11, CALL, 12, CALLED]),  # which ends Qwen3's reasoning too
        ([50, THINK], None, [10, 11, 12]),
        ([50, THINK, END], None, [10, 11]),
        ([50, THINK, END], False, [10, END, 11]),
        ([50, THINK], True, [10, END, 11]),
    ],
)
def test_the_grammar_stands_where_it_stood(
    parser: str, prompt: list[int], ended: bool | None, outputs: list[int]
) -> None:
    engine = manager(parser)
    for moved_at in range(len(outputs) + 1):
        unmoved = request(prompt, ended, [])
        for token in outputs[:moved_at]:
            unmoved.append_output_token_ids([token])
            assert engine.accept_tokens(unmoved, [token])
        moved = request(prompt, ended, outputs[:moved_at])
        put_in_place(moved, engine)
        for one in (unmoved, moved):  # and they go on alike
            for token in outputs[moved_at:]:
                one.append_output_token_ids([token])
                assert engine.accept_tokens(one, [token])
        there, here = (one.structured_output_request.grammar.tokens for one in (unmoved, moved))
        assert there == here, moved_at
