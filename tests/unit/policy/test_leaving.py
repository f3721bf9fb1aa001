"""Which request a pair moves: its rule, and the room that it has."""

import pytest

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.decision_context import Terms
from llumnix.policy.rebalance import SPILL, UNCHECKED, Pair, leaving
from llumnix.policy.request_choice import MovableRequest

A = InstanceLoad("a", 2, 2, used_blocks=70, waiting_blocks=44, head_blocks=40)
B = InstanceLoad("b", 1, used_blocks=79)
VIEW = ClusterView(
    instances={i: InstanceInfo(i, "n", "m", InstanceState.READY, 100, 16) for i in "ab"},
    loads={"a": A, "b": B},
)
HELD = [
    MovableRequest("long", 0, 960, 60, True, 0, 9),
    MovableRequest("short", 0, 160, 10, True, 1, 9),
    MovableRequest("head", 0, 640, 40, False, 2, 0, head=True),
    MovableRequest("behind", 0, 64, 4, False, 3, 0),
]


def name(pair: Pair, rule: str = "low", drains: bool = False) -> str | None:
    chosen = leaving(pair, HELD, VIEW, Terms(), rule, drains)
    return chosen and chosen.request


def test_the_pair_s_own_rule_counts_before_the_one_that_is_configured() -> None:
    assert name(Pair("a", "b")) == "short"
    assert name(Pair("a", "b"), "FCW") == "behind", "the head would not fit"
    assert name(Pair("a", "b", SPILL)) == "behind"


def test_a_pair_that_drains_needs_room_and_nothing_else() -> None:
    assert name(Pair("b", "a"), drains=True) is None, "there is no room for those that run"
    assert name(Pair("a", "b"), drains=True) == "behind", "what waits goes first"


def test_the_room_is_that_of_the_pair_s_rule() -> None:
    assert name(Pair("a", "b", UNCHECKED)) == "short", "who runs and came last, of those that fit"
    free = InstanceLoad("b", 9, used_blocks=10)
    roomy = ClusterView(instances=VIEW.instances, loads={"a": InstanceLoad("a", 2), "b": free})
    unchecked = leaving(Pair("a", "b", UNCHECKED), HELD, roomy, Terms(), "low")
    assert unchecked is not None
    assert leaving(Pair("a", "b"), HELD, roomy, Terms(), "low") is None, "the source is freer"


def test_what_cannot_be_known() -> None:
    with pytest.raises(LookupError, match="the load of a or gone is not known"):
        name(Pair("a", "gone"))
    with pytest.raises(ValueError, match="no rule 'best'"):
        name(Pair("a", "b", "best"))
