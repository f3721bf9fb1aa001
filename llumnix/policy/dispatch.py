"""Dispatch policies: how good an instance is for the next request, and the choice among scores.

A policy is one function from a candidate and a request to a score (greater is better), and one
line in `plugins.POLICIES`. Equal scores are settled at random by `choose`.

A score must not rise when an instance gets one request more, however full it is: whoever has too
much would get the next one too. Only `freeness` and `artifact`, which are there to compare with,
do not keep to that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import nlargest
from math import inf
from random import Random
from typing import NamedTuple

from llumnix.cluster import InstanceId, InstanceInfo, InstanceLoad
from llumnix.policy.decision_context import Terms
from llumnix.policy.load import NOTHING, InFlight, dispatch_freeness, unclaimed

# Above any finite freeness (blocks a request), and small enough that adding a number of blocks to
# it is exact in a float.
_EMPTY = 2.0**40

LONG = 14  # steps of decoding that a prompt's prefill must last to be a long one
# A second that the newcomer waits for the prompts before it weighs as much as a second for which so
# many requests are held up: more than run there, so that no two long prompts meet without need.
WEIGHT = 100
GROWTH = 3  # KV blocks for each request that a long prompt must leave
_FULL = 2.0**40  # above any number of blocks and seconds


@dataclass(slots=True)
class Candidate:
    """What a policy may know of an instance: its last report, and what this node sent it."""

    info: InstanceInfo
    load: InstanceLoad
    sent: InFlight = NOTHING
    dispatched: int = 0  # requests this node sent to it so far
    last: int = 0  # sequence number of the latest of them; 0: none yet


class Request(NamedTuple):
    """What a policy may know of the request to be dispatched."""

    tokens: int = 0  # that have to be computed before its next output
    blocks: int = 0  # KV blocks that it asks for
    priority: int = 0  # vLLM's: the lower, the sooner


Score = Callable[[Candidate, Request, Terms], float]


class Policy(NamedTuple):
    """A score, and whether it may be kept until something about the candidate changes.

    One that may be kept depends on no more of the request than its priority. One that is `alone`
    goes by what its own dispatcher has done, so no two of them run to the same instance.
    """

    score: Score
    keeps: bool = False
    alone: bool = False


def by_load(candidate: Candidate, request: Request, terms: Terms) -> float:
    """The instance with the most room for each request, and without any the least over-full one.

    While there is room that is `by_freeness`. Where more is asked for than there is memory, what
    is lacking counts, as a share of all memory: a queue is worked off as requests end and give
    blocks back, and of two instances the larger one gets back more in the same time. To divide
    what is lacking by the number of requests, as freeness does, would make the longer queue look
    better.
    """
    left = unclaimed(candidate.info, candidate.load, candidate.sent)
    left -= kept_from(candidate, request, terms)
    if left < 0:
        return left / max(candidate.info.total_blocks, 1)
    return by_freeness(candidate, request, terms)


def by_freeness(candidate: Candidate, request: Request, terms: Terms) -> float:
    """The instance with the most room (`dispatch_freeness`, blocks a request): the paper's formula.

    Instances without any request come first, and of these the one with the most free blocks.
    Headroom keeps away all requests but those of the class that it is kept for.

    Under overload it goes the wrong way. It is negative there, and another request, by which the
    same lack is divided, brings it nearer to zero.
    """
    info, load = candidate.info, candidate.load
    free = dispatch_freeness(info, load, candidate.sent, kept_from(candidate, request, terms))
    if free == inf:
        return _EMPTY + info.total_blocks - load.used_blocks
    return free


def kept_from(candidate: Candidate, request: Request, terms: Terms) -> int:
    """Blocks that the requests there keep free of this one: the headroom of other classes."""
    here, coming = candidate.load.priorities, candidate.sent.priorities
    if not terms.classes.by_priority or not (here or coming):
        return 0
    present = {**here, **coming}
    present.pop(request.priority, None)
    return terms.classes.headroom(candidate.info, present)


def by_memory(candidate: Candidate, request: Request, terms: Terms) -> float:
    """The instance with the most free blocks, queued demand taken off: INFaaS++'s memory load."""
    return unclaimed(candidate.info, candidate.load, candidate.sent)


def by_queue(candidate: Candidate, request: Request, terms: Terms) -> float:
    """The instance with the fewest requests waiting, those in flight included."""
    return -(candidate.load.waiting + candidate.sent.requests)


def by_count(candidate: Candidate, request: Request, terms: Terms) -> float:
    """The instance that this node has sent the fewest requests (the artifact's `balanced`)."""
    return -candidate.dispatched


def by_turn(candidate: Candidate, request: Request, terms: Terms) -> float:
    """The instance that this node used the longest time ago: round robin."""
    return -candidate.last


def by_chance(candidate: Candidate, request: Request, terms: Terms) -> float:
    """Any instance: all are equal, and `choose` settles that at random."""
    return 0.0


def by_interference(candidate: Candidate, request: Request, terms: Terms) -> float:
    """For a long prompt, seconds for which it waits and holds others up, taken negative.

    A step that prefills a long prompt makes everyone wait who decodes in the same batch. Freeness
    does not see that: it sends a long prompt to where much memory is left for each request, not to
    where few requests run. So long prompts go to where they hold up the fewest, as long as those
    there keep room to grow, and all else by freeness.

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


MANY = 4  # dispatchers, from which on each looks at some of the instances
LOOKS = 8  # instances that it looks at then


def looked_at(instances: int, dispatchers: int) -> int:
    """How many instances, drawn at random, one of several dispatchers looks at for a request.

    Between two reports all see the same best instance, and each sends it what it has. Of a few that
    each draws for itself the best is nearly as good (the power of two choices: Mitzenmacher, 2001),
    and nobody else's. Few dispatchers look at all, as they know of most that is under way.
    """
    return instances if dispatchers < MANY else min(LOOKS, instances)


def choose(scores: Mapping[InstanceId, float], top_k: int, rng: Random) -> InstanceId:
    """Pick uniformly among the `top_k` best scores; equal scores compete at random.

    With several dispatchers, `top_k` > 1 keeps them from all running to the same best instance.

    Raises:
        ValueError: `scores` is empty or `top_k` is less than 1.
    """
    if not scores or top_k < 1:
        raise ValueError(f"cannot choose the best {top_k} of {len(scores)} instances")
    places = min(top_k, len(scores))
    last = max(scores.values()) if places == 1 else nlargest(places, scores.values())[-1]
    place = rng.randrange(places)
    if places > 1:
        better = [instance for instance, score in scores.items() if score > last]
        if place < len(better):
            return better[place]
    # The remaining places belong to all those with the last score that still counts.
    return rng.choice([instance for instance, score in scores.items() if score == last])
