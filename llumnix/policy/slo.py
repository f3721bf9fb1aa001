"""Dispatch by what a request's clients expect: time to first token, and time per output token.

Both are predicted for each instance from the latency profile and its last report, the way a step is
made up: what is queued there is prefilled first, then this request; after that it decodes in a
batch of one more. What counts is how many requests miss a target of their class with it there: the
newcomer itself, and those that are there already, which it slows down as much as they do it. So
requests without targets gather where few have any. Where nothing is missed, the instance with the
most room is taken.

Those who would miss theirs without the newcomer count as well. To count only those who miss it
because of the newcomer sends everyone to where all is lost already, and that never ends.
"""

from math import inf

from llumnix.cluster import InstanceInfo, InstanceLoad
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import Candidate, Request, by_load
from llumnix.policy.load import InFlight, dispatch_usage, unclaimed

# Of a missed target against blocks of freeness: any part of one outweighs all the room there is.
_WEIGHT = 2.0**41
# From which share of its target on a prediction is doubtful. Steps grow longer while a request
# decodes, and the next requests come: one that is at its target when it begins will miss it.
_DOUBT = 0.7


def expected_ttft(
    info: InstanceInfo, load: InstanceLoad, sent: InFlight, request: Request, terms: Terms
) -> float:
    """Seconds until the first token of a request that is sent there now.

    The step under way ends, half of it on average; then all prompts before it are prefilled, and
    its own. Memory that is short must first be released by others: all of it changes hands in the
    time in which a request like this one generates as many tokens as it has.
    """
    decode = step_seconds(info, load, sent, terms)
    seconds = decode / 2 + terms.latency.step_seconds(
        load.prefill_tokens + sent.tokens + request.tokens,
        0,
        0,
        # Attention is each prompt's own; of the queue only the sum is known.
        request.tokens**2,
    )
    missing = request.blocks - unclaimed(info, load, sent)
    if missing > 0:
        lasts = decode * info.block_size * request.blocks
        seconds += lasts * missing / info.total_blocks
    return seconds


def step_seconds(
    info: InstanceInfo, load: InstanceLoad, sent: InFlight, terms: Terms, more: int = 0
) -> float:
    """Seconds of a decode step there, with `more` further tokens of context from one request."""
    batch = load.running + load.waiting + sent.requests + (1 if more else 0)
    context = dispatch_usage(load, sent) * info.block_size + more
    return terms.latency.step_seconds(0, batch, context) if batch else 0.0


def by_slo(candidate: Candidate, request: Request, terms: Terms) -> float:
    """The instance where the fewest requests miss the targets of their classes for this one."""
    missed = _own(candidate, request, terms) + _others(candidate, request, terms)
    return by_load(candidate, request, terms) - _WEIGHT * missed


def _own(candidate: Candidate, request: Request, terms: Terms) -> float:
    """Which part of the newcomer's targets it would miss; at most 2.

    Whoever has no target for the first token wants at least not to wait for memory.
    """
    info, load, sent = candidate.info, candidate.load, candidate.sent
    wanted = terms.classes.of(request.priority)
    missed = 0.0
    if wanted.ttft < inf:
        missed += _miss(expected_ttft(info, load, sent, request, terms), wanted.ttft)
    elif request.blocks > unclaimed(info, load, sent):
        missed += 1.0
    if wanted.tpot < inf:
        step = step_seconds(info, load, sent, terms, more=request.tokens)
        missed += _miss(step, wanted.tpot)
    return missed


def _others(candidate: Candidate, request: Request, terms: Terms) -> float:
    """How many of the requests that are there miss their time per token, with one more there."""
    info, load, sent = candidate.info, candidate.load, candidate.sent
    step = step_seconds(info, load, sent, terms, more=request.tokens)
    missed = 0.0
    for present in (load.priorities, sent.priorities, _unnamed(load, sent)):
        for priority, count in present.items():
            tpot = terms.classes.of(priority).tpot
            if tpot < inf:
                missed += count * _miss(step, tpot)
    return missed


def _unnamed(load: InstanceLoad, sent: InFlight) -> dict[int, int]:
    """How many requests there have the priority 0, which no report names."""
    named = sum(load.priorities.values()) + sum(sent.priorities.values())
    return {0: max(load.running + load.waiting + sent.requests - named, 0)}


def _miss(expected: float, target: float) -> float:
    """How far a target is missed: from 0, well within it, to 1, beyond it."""
    return min(max((expected / target - _DOUBT) / (1 - _DOUBT), 0.0), 1.0) if target else 1.0
