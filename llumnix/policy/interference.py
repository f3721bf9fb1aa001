"""Dispatch that keeps long prompts from holding up those who decode.

A step that prefills a long prompt makes everyone wait who decodes in the same batch. Freeness does
not see that: it sends a long prompt to where much memory is left for each request, not to where few
requests run. So long prompts go to where they hold up the fewest, as long as those there keep room
to grow, and all else by freeness.
"""

from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import Candidate, Request, by_freeness, kept_from
from llumnix.policy.load import unclaimed

LONG = 14  # steps of decoding that a prompt's prefill must last to be a long one
# A second that the newcomer waits for the prompts before it weighs as much as a second for which so
# many requests are held up: more than run there, so that no two long prompts meet without need.
WEIGHT = 100
GROWTH = 3  # KV blocks for each request that a long prompt must leave
_FULL = 2.0**40  # above any number of blocks and seconds


def by_interference(candidate: Candidate, request: Request, terms: Terms) -> float:
    """For a long prompt, seconds for which it waits and holds others up, taken negative.

    Behind all such instances come those where the requests would have less than `GROWTH` left, the
    one with most first; and behind these, for any prompt, those where it does not fit, the one that
    lacks the fewest blocks first. Headroom that is kept of the request counts as held. Without step
    times (`Terms.latency`) no prompt is long.
    """
    info, load, sent = candidate.info, candidate.load, candidate.sent
    left = unclaimed(info, load, sent) - kept_from(candidate, request, terms) - request.blocks
    if left < 0:
        return -2 * _FULL + left
    latency = terms.latency
    prefill = latency.step_seconds(request.tokens, 0, 0)
    if prefill <= LONG * latency.decode_fixed:
        return by_freeness(candidate, request, terms)
    growth = left / (load.running + load.waiting + sent.requests + 1)
    if growth < GROWTH:
        return -_FULL + growth
    before = latency.prefill_token * (load.prefill_tokens + sent.tokens)
    return -(WEIGHT * before + load.running * prefill)
