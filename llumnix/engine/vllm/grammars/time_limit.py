"""A request's grammar in an engine, which may take so much of its time and no more.

What a token costs there hangs on the text before it: with an ambiguous grammar, as `root ::= root
root | "#"`, it grows with the square of its length, and everybody whom the engine serves stands
meanwhile. The trial of a grammar sees only how it begins.

Each token earns a grammar a little time, and little of what it does not use is kept for later: it
may be dear for a moment, but not after a long beginning that was cheap.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from vllm.v1.request import Request
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from llumnix.engine.vllm.grammars.pending import changed

PER_TOKEN = 0.005  # seconds of CPU
SAVED = 0.1  # which a grammar has at first, and at most
SLOW = "llumnix_slow_grammar"  # the reason for the end of a request whose grammar took more
# The others are an operator's own choice, and may be slow with any grammar.
_BOUNDED = ("xgrammar", "guidance")


class TimedGrammar(StructuredOutputGrammar):
    """Another grammar, until it has taken too long; then it takes no token more."""

    def __init__(self, grammar: StructuredOutputGrammar, on_slow: Callable[[], None]) -> None:
        self._grammar = grammar
        self._on_slow = on_slow
        self._left = SAVED
        self.slow = False  # whether it has taken too long

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Go on by these tokens; False, which ends the request, if the grammar is too slow."""
        if not self.slow:
            self._left += PER_TOKEN * len(tokens)  # first: those of a resumed request come at once
            with self._timed():
                accepted = bool(self._grammar.accept_tokens(request_id, tokens))
            self._left = min(self._left, SAVED)
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
        """Take back tokens that were accepted, and what they have earned."""
        self._left -= PER_TOKEN * num_tokens
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
            self._left -= time.thread_time() - began
            self.slow = self.slow or self._left < 0


def bound(request: Request) -> None:
    """In the engine: have the grammar of a new request take so long, and no longer."""
    structured = request.structured_output_request
    if structured is None or request.sampling_params is None:
        return
    asked = request.sampling_params.structured_outputs
    if asked is None or asked._backend not in _BOUNDED:
        return

    # Not the request itself: its grammar would keep it, and itself, until garbage is collected.
    asking = weakref.ref(request)

    def slow() -> None:
        if (ended := asking()) is not None:
            ended.stop_reason = SLOW

    structured.grammar = changed(structured._grammar, lambda made: TimedGrammar(made, slow))
