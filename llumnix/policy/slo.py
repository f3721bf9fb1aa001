"""Dispatch by what a request's clients expect: time to first token, and time per output token.

Both are predicted for each instance from the latency profile and its last report, the way a step is
made up: what is queued there is prefilled first, then this request; after that it decodes in a
batch of one more. The instance with the smallest violation of the class's targets is taken, the
violations of the requests that are there already counted in; where nothing is violated, the one
with the most room.
"""

from math import inf

from llumnix.cluster import InstanceInfo, InstanceLoad
from llumnix.policy.dispatch import Candidate, Request, by_freeness
from llumnix.policy.load import InFlight, dispatch_usage
from llumnix.policy.terms import Terms

# Of relative violation against blocks of freeness: any violation outweighs all the room there is.
_WEIGHT = 2.0**41


def expected_ttft(
    info: InstanceInfo, load: InstanceLoad, sent: InFlight, request: Request, terms: Terms
) -> float:
    """Seconds until the first token of a request that is sent there now.

    The step under way ends, half of it on average; then all prompts before it are prefilled, and
    its own. Memory that is short must first be released by others: each block that is missing takes
    as long as one block of the batch takes to come free, if requests hold `used / running` blocks
    and go on for as many steps as those hold tokens.
    """
    decode = step_seconds(info, load, sent, terms)
    seconds = decode / 2 + terms.latency.step_seconds(
        load.prefill_tokens + sent.tokens + request.tokens,
        0,
        0,
        # Attention is each prompt's own; of the queue only the sum is known.
        request.tokens**2,
    )
    missing = request.blocks - (info.total_blocks - dispatch_usage(load, sent))
    if missing > 0 and load.used_blocks:
        lasts = decode * info.block_size * load.used_blocks / max(load.running, 1)
        seconds += lasts * missing / load.used_blocks
    return seconds


def step_seconds(
    info: InstanceInfo, load: InstanceLoad, sent: InFlight, terms: Terms, more: int = 0
) -> float:
    """Seconds of a decode step there, with `more` further tokens of context from one request."""
    batch = load.running + load.waiting + sent.requests + (1 if more else 0)
    context = dispatch_usage(load, sent) * info.block_size + more
    return terms.latency.step_seconds(0, batch, context) if batch else 0.0


def by_slo(candidate: Candidate, request: Request, terms: Terms) -> float:
    """The instance where the targets of the request's class are missed the least."""
    info, load, sent = candidate.info, candidate.load, candidate.sent
    wanted = terms.classes.of(request.priority)
    violation = 0.0
    if wanted.ttft < inf:
        expected = expected_ttft(info, load, sent, request, terms)
        violation += max(expected / wanted.ttft - 1.0, 0.0)
    # Those that are there already are slowed down by the newcomer as much as it is by them.
    targets = [wanted.tpot] + [terms.classes.of(p).tpot for p, n in load.priorities.items() if n]
    if (tpot := min(targets)) < inf:
        step = step_seconds(info, load, sent, terms, more=request.tokens)
        violation += max(step / tpot - 1.0, 0.0)
    return by_freeness(candidate, request, terms) - _WEIGHT * violation
