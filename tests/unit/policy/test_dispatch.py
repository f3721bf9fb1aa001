"""The dispatch policies on real load objects, and the choice among scores."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.cluster import InstanceInfo, InstanceLoad, InstanceState
from llumnix.plugins import POLICIES
from llumnix.policy.decision_context import TERMS
from llumnix.policy.dispatch import Candidate, Request, choose
from llumnix.policy.load import InFlight

REQUEST = Request(100, 7)


def candidate(
    running: int = 0,
    waiting: int = 0,
    used_blocks: int = 0,
    waiting_blocks: int = 0,
    total: int = 100,
    sent: InFlight | None = None,
    dispatched: int = 0,
    last: int = 0,
) -> Candidate:
    info = InstanceInfo("i", "n", "m", InstanceState.READY, total, 16)
    load = InstanceLoad("i", running, waiting, used_blocks, waiting_blocks)
    return Candidate(info, load, sent or InFlight(), dispatched, last)


def score(policy: str, of: Candidate, request: Request = REQUEST) -> float:
    return POLICIES[policy].score(of, request, TERMS)


@pytest.mark.parametrize(
    ("policy", "better", "worse"),
    [
        ("load", candidate(running=2, used_blocks=20), candidate(running=2, used_blocks=30)),
        ("load", candidate(), candidate(running=1, used_blocks=1)),
        ("load", candidate(total=200), candidate(total=100)),  # both empty: the larger one
        ("load", candidate(), candidate(sent=InFlight(1, 5, 80))),
        ("load", candidate(running=1, used_blocks=90), candidate(waiting=9, waiting_blocks=90)),
        ("queue", candidate(running=9, waiting=1), candidate(waiting=2)),
        ("queue", candidate(waiting=1), candidate(sent=InFlight(2, 2, 2))),
        ("balanced", candidate(dispatched=3, running=9), candidate(dispatched=4)),
        ("rr", candidate(last=0), candidate(last=7)),
        ("rr", candidate(last=7, dispatched=9), candidate(last=8)),
    ],
)
def test_the_better_instance_scores_higher(
    policy: str, better: Candidate, worse: Candidate
) -> None:
    assert score(policy, better) > score(policy, worse)


def test_random_prefers_nobody() -> None:
    full = candidate(running=50, used_blocks=99)
    assert score("random", candidate()) == score("random", full)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 5000), st.integers(0, 5000))
def test_every_policy_scores_every_load(running: int, waiting: int, used: int, ask: int) -> None:
    loaded = candidate(running=running, waiting=waiting, used_blocks=used, waiting_blocks=ask)
    for policy in POLICIES:
        assert isinstance(score(policy, loaded), float | int)


def picks(scores: dict[str, float], top_k: int, seed: int = 0) -> Counter[str]:
    rng = Random(seed)
    return Counter(choose(scores, top_k, rng) for _ in range(3000))


def test_the_best_is_chosen_and_ties_are_settled_evenly() -> None:
    assert set(picks({"a": 1.0, "b": 2.0, "c": 2.0}, top_k=1)) == {"b", "c"}
    assert picks({"a": 1.0, "b": 2.0}, top_k=1) == {"b": 3000}
    assert min(picks({"a": 0.0, "b": 0.0, "c": 0.0}, top_k=1).values()) > 850


def test_top_k_is_uniform_over_the_best_k() -> None:
    counts = picks({"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.0}, top_k=3)
    assert set(counts) == {"a", "b", "c"}
    assert min(counts.values()) > 850


def test_a_tie_for_the_last_place_shares_that_place() -> None:
    counts = picks({"a": 3.0, "b": 2.0, "c": 2.0}, top_k=2)
    assert 1350 < counts["a"] < 1650
    assert min(counts["b"], counts["c"]) > 600


def test_more_places_than_instances() -> None:
    assert set(picks({"a": 3.0, "b": 2.0}, top_k=9)) == {"a", "b"}


def test_the_same_seed_chooses_the_same() -> None:
    scores = dict.fromkeys("abcdef", 1.0)
    first, second = Random(7), Random(7)
    assert [choose(scores, 1, first) for _ in range(50)] == [
        choose(scores, 1, second) for _ in range(50)
    ]


@pytest.mark.parametrize(("scores", "top_k"), [({}, 1), ({"a": 1.0}, 0)])
def test_nothing_to_choose_is_an_error(scores: dict[str, float], top_k: int) -> None:
    with pytest.raises(ValueError, match="cannot choose"):
        choose(scores, top_k, Random(0))
