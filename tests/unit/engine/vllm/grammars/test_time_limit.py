"""A grammar whose tokens become dearer and dearer ends its own request, and holds nobody up."""

from argparse import Namespace
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from llumnix.engine.vllm.grammars import time_limit
from llumnix.engine.vllm.grammars.time_limit import (
    PER_TOKEN,
    SAVED,
    SLOW,
    TimedGrammar,
    bound,
)


class Grammar:
    """Each token, or each look at what may come next, takes so many seconds of CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.accepting = self.filling = self.now = 0.0
        self.accepted: list[int] = []
        self.rolled_back = self.resets = self.filled = 0
        monkeypatch.setattr(time_limit.time, "thread_time", lambda: self.now)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.now += self.accepting * len(tokens)
        self.accepted += tokens
        return 13 not in tokens

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        self.now += self.filling
        return tokens[:2]

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        self.now += self.filling
        self.filled += 1
        bitmask[batch_index].fill_(0)

    def rollback(self, num_tokens: int) -> None:
        self.rolled_back += num_tokens

    def is_terminated(self) -> bool:
        return len(self.accepted) == 5

    def reset(self) -> None:
        self.resets += 1


def made(grammar: Any) -> tuple[TimedGrammar, list[str]]:
    said: list[str] = []
    return TimedGrammar(grammar, lambda: said.append("slow")), said


def test_a_grammar_that_is_quick_is_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Grammar(monkeypatch)
    grammar, said = made(inner)
    assert grammar.accept_tokens("r", [1, 2, 3, 4]) and not grammar.is_terminated()
    assert not grammar.accept_tokens("r", [13]) and grammar.is_terminated()
    assert grammar.validate_tokens([5, 6, 7]) == [5, 6]
    mask = torch.ones(2, 4, dtype=torch.int32)
    grammar.fill_bitmask(mask, 1)
    assert mask.tolist() == [[1] * 4, [0] * 4]
    grammar.rollback(3)
    grammar.reset()
    assert (inner.rolled_back, inner.resets) == (3, 1)
    assert not said and not grammar.slow


@pytest.mark.parametrize(("what", "most"), [("accepting", 6), ("filling", 7)])
def test_a_slow_one_takes_so_long_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, what: str, most: int
) -> None:
    inner = Grammar(monkeypatch)
    setattr(inner, what, 4 * PER_TOKEN)
    grammar, said = made(inner)
    mask = torch.zeros(1, 4, dtype=torch.int32)
    taken = 0
    while grammar.accept_tokens("r", [1]):
        grammar.fill_bitmask(mask, 0)
        taken += 1
    assert said == ["slow"]
    assert taken == most, "three tokens' worth of what it had saved for each"
    accepted, filled = len(inner.accepted), inner.filled
    assert not grammar.accept_tokens("r", [1]) and len(inner.accepted) == accepted
    assert grammar.validate_tokens([1]) == []
    grammar.fill_bitmask(mask, 0)
    assert mask.tolist() == [[-1] * 4] and inner.filled == filled


def test_a_cheap_beginning_saves_no_time_for_a_dear_end(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Grammar(monkeypatch)
    grammar, _ = made(inner)
    for _ in range(10_000):
        assert grammar.accept_tokens("r", [1])
    inner.accepting = SAVED + 2 * PER_TOKEN
    assert not grammar.accept_tokens("r", [1])


def test_what_a_request_brings_when_it_is_resumed_has_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner = Grammar(monkeypatch)
    inner.accepting = 0.9 * PER_TOKEN
    assert made(inner)[0].accept_tokens("r", [1] * 10_000)


def test_tokens_that_are_taken_back_earn_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Grammar(monkeypatch)
    inner.accepting = PER_TOKEN
    grammar, said = made(inner)
    while grammar.accept_tokens("r", [1] * 4):
        grammar.rollback(4)
    assert 5 <= len(inner.accepted) / 4 <= 7 and said


def asking(backend: str, grammar: Any) -> Any:
    params = Namespace(structured_outputs=Namespace(_backend=backend))
    structured = Namespace(grammar=grammar, _grammar=grammar)
    return Namespace(sampling_params=params, structured_output_request=structured, stop_reason=None)


def test_a_request_says_why_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Grammar(monkeypatch)
    inner.accepting = 1.0
    compiling: Future[Any] = Future()
    request = asking("xgrammar", compiling)
    bound(request)
    assert not request.structured_output_request.grammar.done()
    compiling.set_result(inner)
    grammar = request.structured_output_request.grammar.result()
    assert not grammar.accept_tokens("r", [1])
    assert request.stop_reason == SLOW


def test_a_grammar_that_cannot_be_compiled_fails_as_without() -> None:
    compiling: Future[Any] = Future()
    request = asking("guidance", compiling)
    bound(request)
    compiling.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        request.structured_output_request.grammar.result()


def test_an_operators_slow_backend_is_let_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Grammar(monkeypatch)
    request = asking("outlines", grammar)
    bound(request)
    assert request.structured_output_request.grammar is grammar
