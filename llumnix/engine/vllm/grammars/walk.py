"""The first tokens of a grammar, taken on trial as an engine would take them."""

from collections.abc import Callable
from typing import Any

import numpy as np

STEPS = 8  # tokens that are taken on trial; a grammar without a way out mostly shows at the first
LONG_STEPS = 8  # of the longest ones; see time_limit for what these show


def walk(backend: Any, compiled: Callable[[], Any], lengths: Any) -> None:
    """Take some tokens as an engine would: any, and then, anew, the longest.

    `compiled` makes the grammar; `lengths` is of `text_lengths`. Raises ValueError where a grammar
    allows none.
    """
    _steps(backend, compiled(), STEPS, lambda allowed: int(allowed[0]))
    _steps(backend, compiled(), LONG_STEPS, lambda allowed: int(allowed[lengths[allowed].argmax()]))


def _steps(backend: Any, grammar: Any, most: int, choose: Callable[[Any], int]) -> None:
    mask = backend.allocate_token_bitmask(1)
    for _ in range(most):
        if grammar.is_terminated():
            return
        grammar.fill_bitmask(mask, 0)
        allowed = _bits(mask[0])
        if not len(allowed):
            raise ValueError("there is no text that it allows")
        if not grammar.accept_tokens("trial", [choose(allowed)]):
            return


def _bits(mask: Any) -> Any:
    """The numbers of the bits that are set in words of 32, in order."""
    octets = mask.numpy().view("uint8")
    return np.flatnonzero(np.unpackbits(octets, bitorder="little"))


def text_lengths(tokenizer: Any, vocabulary: int) -> Any:
    """Of each token's text, about; 0 where there is none."""
    vocabulary = max(vocabulary, len(tokenizer))
    found = np.zeros(-(-vocabulary // 32) * 32, dtype=np.int32)
    for text, token in tokenizer.get_vocab().items():
        if token < vocabulary:
            found[token] = len(text)
    return found
