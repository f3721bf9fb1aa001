"""No instance looks better to a dispatcher for having got one request more, however full it is."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llumnix.cluster import InstanceInfo, InstanceLoad, InstanceState, kv_blocks
from llumnix.latency import LatencyProfile
from llumnix.plugins import POLICIES
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import Candidate, Request
from llumnix.policy.load import InFlight
from llumnix.policy.priority_classes import Classes, PriorityClass

# These are kept as others have published them, to compare with.
EXEMPT = {
    "freeness": "the paper's formula: what lacks is divided by the number of requests",
    "artifact": "the same, and a request with headroom makes others of its class welcome",
}

SIZE = 16
HIGH, CHAT, PLAIN = -1, 1, 0
CLASSES = Classes(
    {
        HIGH: PriorityClass("high", HIGH, target_tokens=40 * SIZE, tpot=0.03),
        CHAT: PriorityClass("chat", CHAT, headroom_tokens=5 * SIZE, ttft=0.5, tpot=0.02),
        PLAIN: PriorityClass("plain", PLAIN, ttft=5.0, tpot=0.06),
    }
)
PROFILES = (
    LatencyProfile(),
    LatencyProfile(5.6e-3, 0.2e-3, 5e-9, 30e-3, 0.3e-3, 1.5e-6),
    LatencyProfile(0.0, 1e-3, 0.0, 0.0, 1e-3, 1e-5),
)

counts = st.integers(0, 40)
blocks = st.integers(0, 400)
priorities = st.sampled_from([HIGH, CHAT, PLAIN, 7])
named = st.dictionaries(st.sampled_from([HIGH, CHAT, 7]), st.integers(1, 20), max_size=2)
terms = st.builds(
    lambda classes, latency: Terms(classes=classes, latency=latency),
    st.sampled_from([CLASSES, Classes()]),
    st.sampled_from(PROFILES),
)
requests = st.builds(
    lambda tokens, priority: Request(tokens, kv_blocks(tokens, SIZE), priority),
    st.integers(1, 3000),
    priorities,
)


@st.composite
def candidates(draw: st.DrawFn) -> Candidate:
    """Any load, of more than there is memory for, too; what runs or waits asks for some of it."""
    info = InstanceInfo("i", "n", "m", InstanceState.READY, draw(st.integers(1, 300)), SIZE)
    running, waiting, coming = draw(counts), draw(counts), draw(counts)
    here, there = draw(named), draw(named)
    queued = waiting + draw(blocks) if waiting else 0
    load = InstanceLoad(
        "i",
        running=max(running, sum(here.values()) - waiting),
        waiting=waiting,
        used_blocks=draw(st.integers(0, info.total_blocks)),  # it may hold some for a move to it
        waiting_blocks=queued,
        head_blocks=draw(st.integers(0, queued)),
        prefill_tokens=draw(st.integers(0, 9000)),
        preempted=draw(st.integers(0, waiting)),
        priorities=here,
    )
    coming = max(coming, sum(there.values()))
    sent = InFlight(
        coming,
        coming + draw(blocks) if coming else 0,
        coming * draw(st.integers(1, 300)),
        there,
    )
    dispatched = draw(counts)
    return Candidate(info, load, sent, dispatched, draw(st.integers(0, dispatched)))


def more(of: Candidate, how: str, request: Request) -> Candidate:
    """The same with one request more: of the same view, but further on."""
    load, asks = of.load, request.blocks
    if how == "in flight":
        sent = of.sent.plus(asks, request.tokens, request.priority)
        return Candidate(of.info, load, sent, of.dispatched + 1, of.last + 1)
    present = dict(load.priorities)
    if request.priority:
        present[request.priority] = present.get(request.priority, 0) + 1
    load = replace(load, priorities=present)
    if how == "running":
        load = replace(load, running=load.running + 1, used_blocks=load.used_blocks + asks)
    else:
        load = replace(
            load,
            waiting=load.waiting + 1,
            waiting_blocks=load.waiting_blocks + asks,
            head_blocks=load.head_blocks or asks,
            prefill_tokens=load.prefill_tokens + request.tokens,
        )
    return Candidate(of.info, load, of.sent, of.dispatched, of.last)


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - EXEMPT.keys()))
@pytest.mark.parametrize("how", ["running", "waiting", "in flight"])
@given(candidates(), requests, requests, terms)
def test_no_score_rises_when_a_request_is_added(
    policy: str, how: str, of: Candidate, added: Request, wanted: Request, said: Terms
) -> None:
    score = POLICIES[policy].score
    assert score(more(of, how, added), wanted, said) <= score(of, wanted, said)


# Four run in 100 blocks, 100 more are asked for: 100 are lacking. With one request more it is 120.
OVERFULL = Candidate(
    InstanceInfo("i", "n", "m", InstanceState.READY, 100, SIZE),
    InstanceLoad("i", 4, 5, used_blocks=100, waiting_blocks=100, head_blocks=50),
)


@pytest.mark.parametrize("policy", sorted(EXEMPT))
def test_those_exempt_are_so_for_a_reason(policy: str) -> None:
    score, small = POLICIES[policy].score, Request(16, 2)
    assert score(more(OVERFULL, "waiting", small), small, Terms()) > score(OVERFULL, small, Terms())


@example(1, 2)
@given(st.integers(0, 30), st.integers(0, 30))
def test_of_two_that_are_over_full_the_one_that_lacks_less_is_taken(one: int, other: int) -> None:
    """As freeness would not: ten requests that lack 100 blocks before two that lack 30."""

    def score(requests: int, lack: int) -> float:
        load = InstanceLoad("i", 1, requests, used_blocks=100, waiting_blocks=lack)
        return POLICIES["load"].score(Candidate(OVERFULL.info, load), Request(16, 2), Terms())

    assert score(one, 100) < score(other, 30) < 0


def test_of_two_that_lack_as_much_the_larger_one_is_taken() -> None:
    """It gives back more memory in the same time."""
    load = InstanceLoad("i", 5, 5, used_blocks=100, waiting_blocks=100)
    large = replace(OVERFULL.info, total_blocks=200)
    more_used = replace(load, used_blocks=200)
    scores = [
        POLICIES["load"].score(Candidate(*of), Request(16, 2), Terms())
        for of in ((OVERFULL.info, load), (large, more_used))
    ]
    assert scores[0] < scores[1] < 0
