"""Dispatch that keeps long prompts from holding up those who decode.

A step that prefills a long prompt makes everyone wait who decodes in the same batch. Freeness does
not see that: it sends a long prompt to where much memory is left for each request, not to where few
requests run. So long prompts go to where they hold up the fewest, and all else by freeness.
"""

from llumnix.policy.dispatch import Candidate, Request, by_freeness
from llumnix.policy.load import unclaimed
from llumnix.policy.terms import Terms

LONG = 14  # steps of decoding that a prompt's prefill must last to be a long one
# A second that the newcomer waits for the prompts before it weighs as much as a second for which so
# many requests are held up.
WEIGHT = 10
_FULL = 2.0**40  # above any number of seconds


def by_interference(candidate: Candidate, request: Request, terms: Terms) -> float:
    """For a long prompt, seconds for which it waits and holds others up, taken negative.

    An instance where it does not fit comes behind all where it does, the one that lacks the fewest
    blocks first. Without step times (`Terms.latency`) no prompt is long.
    """
    latency = terms.latency
    prefill = latency.step_seconds(request.tokens, 0, 0)
    if prefill <= LONG * latency.decode_fixed:
        return by_freeness(candidate, request, terms)
    info, load, sent = candidate.info, candidate.load, candidate.sent
    missing = request.blocks - unclaimed(info, load, sent)
    if missing > 0:
        return -_FULL - missing
    before = latency.prefill_token * (load.prefill_tokens + sent.tokens)
    return -(WEIGHT * before + load.running * prefill)
