"""A grammar whose tokens become dearer and dearer ends its own request, and holds nobody up."""

import time
from argparse import Namespace
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from llumnix.engine.vllm import grammar_time
from llumnix.engine.vllm.grammar_time import AT_FIRST, PER_TOKEN, SLOW, TimedGrammar, bound


class Grammar:
    """Each token takes so many seconds of CPU."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.accepted: list[int] = []
        self.filled = 0

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        until = time.thread_time() + self.seconds * len(tokens)
        while time.thread_time() < until:
            pass
        self.accepted += tokens
        return 13 not in tokens

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        self.filled += 1
        bitmask[batch_index].fill_(0)


def made(grammar: Any) -> tuple[TimedGrammar, list[str]]:
    said: list[str] = []
    return TimedGrammar(grammar, lambda: said.append("slow")), said


def test_a_grammar_that_is_quick_is_as_without() -> None:
    inner = Grammar()
    grammar, said = made(inner)
    assert grammar.accept_tokens("r", list(range(12)))
    assert not grammar.accept_tokens("r", [13])
    mask = torch.ones(2, 4, dtype=torch.int32)
    grammar.fill_bitmask(mask, 1)
    assert mask.tolist() == [[1] * 4, [0] * 4]
    assert not said and not grammar.slow


def test_a_slow_one_takes_so_long_and_no_longer() -> None:
    inner = Grammar(0.05)
    grammar, said = made(inner)
    taken = 0
    while grammar.accept_tokens("r", [1]):
        taken += 1
    assert said == ["slow"]
    assert taken == pytest.approx(AT_FIRST / (0.05 - PER_TOKEN), abs=2)
    before = len(inner.accepted)
    assert not grammar.accept_tokens("r", [1]) and len(inner.accepted) == before
    mask = torch.zeros(1, 4, dtype=torch.int32)
    grammar.fill_bitmask(mask, 0)
    assert mask.tolist() == [[-1] * 4] and not inner.filled


def asking(backend: str, grammar: Any) -> Any:
    params = Namespace(structured_outputs=Namespace(_backend=backend))
    structured = Namespace(grammar=grammar, _grammar=grammar)
    return Namespace(sampling_params=params, structured_output_request=structured, stop_reason=None)


def test_a_request_says_why_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_time, "AT_FIRST", -1.0)
    compiling: Future[Any] = Future()
    request = asking("xgrammar", compiling)
    bound(request)
    assert not request.structured_output_request.grammar.done()
    compiling.set_result(Grammar())
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


def test_an_operators_slow_backend_is_let_alone() -> None:
    grammar = Grammar()
    request = asking("outlines", grammar)
    bound(request)
    assert request.structured_output_request.grammar is grammar
