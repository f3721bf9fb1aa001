"""Priority classes in every decision, with the artifact's numbers: 1,600 tokens for a high one."""

from dataclasses import replace
from math import inf
from random import Random

import pytest

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import Request
from llumnix.policy.dispatch_state import DispatchState
from llumnix.policy.load import freeness, virtual_usage
from llumnix.policy.priority_classes import Classes, PriorityClass
from llumnix.policy.rebalance import Pair, pairs, room

HIGH = PriorityClass("high", -1, target_tokens=1600)
SOON = PriorityClass("soon", 1, headroom_tokens=1000)
CLASSES = Classes({-1: HIGH, 0: PriorityClass("normal"), 1: SOON, 9: PriorityClass("batch", 9)})
TERMS = Terms(classes=CLASSES)
# A 7B model on a GPU of 24 GB, as in the paper: 851 blocks of 16 tokens.
BLOCKS = 851


def info(instance: str, blocks: int = BLOCKS) -> InstanceInfo:
    return InstanceInfo(instance, instance, "m", InstanceState.READY, blocks, 16)


def load(instance: str, requests: int, blocks: int, **priorities: int) -> InstanceLoad:
    """So many running requests with so many blocks, of which some have a class."""
    numbers = {"high": -1, "soon": 1, "batch": 9}
    counts = {numbers[name]: count for name, count in priorities.items()}
    return InstanceLoad(instance, requests, used_blocks=blocks, priorities=counts)


def view(*loads: InstanceLoad, draining: str = "") -> ClusterView:
    return ClusterView(
        instances={each.instance: info(each.instance) for each in loads},
        loads={each.instance: each for each in loads},
        draining=frozenset({draining} - {""}),
    )


def chosen(priority: int, *loads: InstanceLoad) -> str | None:
    board = DispatchState("n", rng=Random(1), terms=TERMS)
    board.update_view(view(*loads))
    return board.decide(Request(100, 7, priority))


def test_headroom_is_what_is_left_above_the_target() -> None:
    assert HIGH.headroom(info("a")) == BLOCKS - 100
    assert HIGH.headroom(info("a", 80)) == 0, "smaller than the target: nothing can be kept free"
    assert SOON.headroom(info("a")) == 63, "1,000 tokens are 62.5 blocks"


def test_headroom_is_the_class_s_and_not_each_request_s() -> None:
    for count in (1, 2, 50):
        assert CLASSES.headroom(info("a"), {-1: count}) == BLOCKS - 100
    assert CLASSES.headroom(info("a"), {-1: 1, 1: 4, 9: 7, 0: 3}) == BLOCKS - 100 + 63
    assert CLASSES.headroom(info("a"), {-1: 0, 9: 7}) == 0
    assert CLASSES.headroom(info("a"), {}) == 0


def test_one_more_of_a_class_keeps_nothing_more_free() -> None:
    assert CLASSES.added(info("a"), {}) == {-1: BLOCKS - 100, 1: 63}
    assert CLASSES.added(info("a"), {-1: 2}) == {-1: 0, 1: 63}


def test_headroom_counts_as_used() -> None:
    alone = load("a", 4, 80)
    shared = load("a", 4, 80, high=1)
    assert freeness(info("a"), alone, CLASSES) == (BLOCKS - 80) / 4
    assert virtual_usage(info("a"), shared, CLASSES) == 80 + BLOCKS - 100
    assert freeness(info("a"), shared, CLASSES) == (100 - 80) / 4


def test_normal_requests_avoid_an_instance_with_an_important_one() -> None:
    """It is by far the emptiest, but not for them."""
    calm, crowded = load("calm", 2, 90, high=1), load("crowded", 20, 600)
    assert chosen(0, calm, crowded) == chosen(9, calm, crowded) == "crowded", "5 is less than 12.5"
    assert chosen(0, replace(calm, priorities={}), crowded) == "calm"


def test_important_requests_do_not_avoid_their_own() -> None:
    calm, crowded = load("calm", 2, 90, high=1), load("crowded", 20, 600)
    assert chosen(-1, calm, crowded) == "calm"
    assert chosen(-1, load("calm", 2, 90, soon=1, high=1), crowded) == "calm"
    assert chosen(1, load("calm", 2, 90, high=1), crowded) == "crowded"


def test_a_crowded_instance_gives_away_when_an_important_request_comes() -> None:
    before = view(load("a", 10, 90), load("b", 10, 400))
    assert pairs(before, TERMS) == []
    after = view(load("a", 10, 90, high=1), load("b", 10, 400))
    assert pairs(after, TERMS) == [Pair("a", "b")], "although b holds four times as much"
    assert pairs(after) == [], "without classes a priority is a number"


def test_an_important_request_alone_has_nothing_to_give_away() -> None:
    assert pairs(view(load("a", 1, 300, high=1), load("b", 0, 0)), TERMS) == []


def test_it_is_isolated_and_then_there_is_peace() -> None:
    """One after the other leaves, until what stays is within the target; nothing comes back."""
    a, b = load("a", 9, 140, high=1), load("b", 9, 140)
    moves = 0
    while pairs(view(a, b), TERMS) == [Pair("a", "b")]:
        a = replace(a, running=a.running - 1, used_blocks=a.used_blocks - 15)
        b = replace(b, running=b.running + 1, used_blocks=b.used_blocks + 15)
        moves += 1
    assert pairs(view(a, b), TERMS) == []
    assert 0 < moves < 8 and freeness(info("a"), a, CLASSES) >= 3


@pytest.mark.parametrize("draining", ["", "a"])
def test_the_room_for_a_request_that_keeps_headroom(draining: str) -> None:
    found = room(view(load("a", 5, 120, high=1), load("b", 5, 120), draining=draining), *_PAIR)
    assert found is not None and found.blocks == BLOCKS - 120
    assert found.headroom == ({} if draining else {-1: BLOCKS - 100, 1: 63})
    assert (found.floor == -inf) is bool(draining), "who has to go goes wherever memory is"


_PAIR = Pair("a", "b"), TERMS


def test_classes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="both a headroom and a target"):
        PriorityClass("high", -1, headroom_tokens=5, target_tokens=5)
    with pytest.raises(ValueError, match="negative"):
        PriorityClass("high", -1, ttft=-1)


def test_headroom_of_those_that_nobody_has_set_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="class high keeps headroom, so its priority can't be 0"):
        PriorityClass("high", 0, target_tokens=1600)
    PriorityClass("normal", 0, ttft=1.0)
