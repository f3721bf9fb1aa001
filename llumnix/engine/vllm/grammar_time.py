"""A request's grammar in an engine, which may take so much of its time and no more.

What a token costs there hangs on the text before it: with an ambiguous grammar, as `root ::= root
root | "#"`, it grows with the square of its length, and everybody whom the engine serves stands
meanwhile. The trial of a grammar sees only how it begins.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from vllm.v1.request import Request
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

AT_FIRST, PER_TOKEN = 0.1, 0.005  # seconds of CPU
SLOW = "llumnix_slow_grammar"  # the reason for the end of a request whose grammar took more
# The others are an operator's own choice, and may be slow with any grammar.
_BOUNDED = ("xgrammar", "guidance")


class TimedGrammar(StructuredOutputGrammar):
    """Another grammar, until it has taken too long; then it takes no token more."""

    def __init__(self, grammar: StructuredOutputGrammar, on_slow: Callable[[], None]) -> None:
        self._grammar = grammar
        self._on_slow = on_slow
        self._tokens = 0
        self._seconds = 0.0

    @property
    def slow(self) -> bool:
        """Whether it has taken too long."""
        return self._seconds > AT_FIRST + PER_TOKEN * self._tokens

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Go on by these tokens; False, which ends the request, if the grammar is too slow."""
        if not self.slow:
            with self._timed():
                accepted = bool(self._grammar.accept_tokens(request_id, tokens))
            self._tokens += len(tokens)
            if not self.slow:
                return accepted
        self._on_slow()
        return False

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """Those of the tokens, from the first on, that the grammar allows; none if it is slow."""
        if self.slow:
            return []
        with self._timed():
            allowed: list[int] = self._grammar.validate_tokens(tokens)
        return allowed

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        """Say which tokens may come next: all, if the grammar is slow, as the request ends then."""
        if self.slow:
            bitmask[batch_index].fill_(-1)
            return
        with self._timed():
            self._grammar.fill_bitmask(bitmask, batch_index)

    def rollback(self, num_tokens: int) -> None:
        """Take back tokens that were accepted."""
        self._grammar.rollback(num_tokens)

    def is_terminated(self) -> bool:
        """Whether the text is complete."""
        return bool(self._grammar.is_terminated())

    def reset(self) -> None:
        """Begin again."""
        self._grammar.reset()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self._seconds += time.thread_time() - began


def bound(request: Request) -> None:
    """In the engine: have the grammar of a new request take so long, and no longer."""
    structured = request.structured_output_request
    if structured is None or request.sampling_params is None:
        return
    asked = request.sampling_params.structured_outputs
    if asked is None or asked._backend not in _BOUNDED:
        return

    def slow() -> None:
        request.stop_reason = SLOW

    structured.grammar = changed(structured._grammar, lambda made: TimedGrammar(made, slow))


def changed(
    grammar: Any, change: Callable[[StructuredOutputGrammar], StructuredOutputGrammar]
) -> Any:
    """What a change makes of a grammar, which may still be compiling: then it is a future, too."""
    if not isinstance(grammar, Future):
        return change(grammar)
    made: Future[StructuredOutputGrammar] = Future()

    def when_compiled(done: "Future[StructuredOutputGrammar]") -> None:
        try:
            made.set_result(change(done.result()))
        except Exception as error:
            made.set_exception(error)

    grammar.add_done_callback(when_compiled)
    return made
