"""What goes into a modelled engine, and what comes out of its steps."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


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
