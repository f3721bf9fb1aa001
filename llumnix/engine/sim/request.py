"""What goes into a modelled engine, and what comes out of its steps.

The token at a position depends on the prompt and that position only. So a stream is the same
whether its request ran alone, in a batch, was preempted, or moved in the middle, and any test can
say what the right answer is.
"""

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple
from zlib import crc32


class FinishReason(StrEnum):
    """Why a request ended by itself, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request as an engine gets it, new or to be resumed.

    A request that arrives with `generated` outputs is prefilled as prompt and outputs, and goes on
    at that position. `cached` tokens of it need no computing, since their KV cache came along (a
    move); only full blocks of them count, and a preemption loses them.
    """

    id: str
    prompt: Sequence[int]  # token ids
    max_tokens: int  # outputs, those generated before included
    generated: int = 0
    ends_at: int | None = None  # the number of outputs of which the last is EOS; None: never EOS
    stop_token_ids: Collection[int] = ()
    priority: int = 0  # lower is earlier, where the engine is configured for it
    cached: int = 0
    front: bool = False  # at the head of the queue, before all others of its priority


class Output(NamedTuple):
    """What one step brought for one request."""

    request: str
    tokens: tuple[int, ...]
    finish: FinishReason | None


class StepResult(NamedTuple):
    """What one step did; `preempted` requests are back in the queue and will go on."""

    seconds: float
    outputs: list[Output]
    preempted: list[str]
    computed: int = 0  # tokens; with none, the step changed nothing


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
