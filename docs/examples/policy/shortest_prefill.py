"""A dispatch policy of one's own: the instance with the fewest prompt tokens to be computed."""

from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import Candidate, Request


def shortest_prefill(candidate: Candidate, request: Request, terms: Terms) -> float:
    """Greater is better: tokens to be prefilled there, reported or on their way, taken negative."""
    return -(candidate.load.prefill_tokens + candidate.sent.tokens)
