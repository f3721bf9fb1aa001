"""The tokens that a modelled device generates.

The token at a position depends on the prompt and that position only. So a stream is the same
whether its request ran alone, in a batch, was preempted, or moved in the middle, and any test can
say what the right answer is.
"""

from array import array
from collections.abc import Collection, Sequence
from zlib import crc32

_MASK = (1 << 64) - 1


def stream_seed(prompt: Sequence[int]) -> int:
    """The number that stands for a prompt (token ids) in `token_at`."""
    return crc32(array("q", prompt).tobytes()) | len(prompt) << 32


def token_at(seed: int, position: int, vocab_size: int, avoid: Collection[int] = ()) -> int:
    """The token at output `position` (0 is the first), never one of `avoid`.

    splitmix64 (Steele, Lea and Flood, OOPSLA'14) over the seed and the position. `avoid` must
    leave at least one token of the vocabulary.
    """
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    token = (x ^ x >> 31) % vocab_size
    while token in avoid:
        token = (token + 1) % vocab_size
    return token
