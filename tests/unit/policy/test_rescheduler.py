"""Rounds of rescheduling around whatever rule there is."""

import pytest

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.decision_context import Terms
from llumnix.policy.priority_classes import Classes, PriorityClass
from llumnix.policy.rebalance import Pair, Planner, room
from llumnix.policy.rescheduler import PAPER, MoveOrder, Rescheduler

READY, DRAINING = InstanceState.READY, InstanceState.DRAINING
HIGH = Terms(classes=Classes({-1: PriorityClass("high", -1, target_tokens=10 * 16)}))


def view(*loads: InstanceLoad, draining: str = "") -> ClusterView:
    infos = (
        InstanceInfo(i.instance, "n", "m", DRAINING if i.instance in draining else READY, 100, 16)
        for i in loads
    )
    return ClusterView(
        instances={info.id: info for info in infos}, loads={load.instance: load for load in loads}
    )


def naming(*pairs: Pair) -> Planner:
    return lambda view, terms, allowed: list(pairs)


A, B, C = (InstanceLoad(i, 3, used_blocks=30) for i in "abc")


@pytest.mark.parametrize("pair", [Pair("a", "gone"), Pair("gone", "b")])
def test_a_pair_that_is_not_there_is_left_out(pair: Pair) -> None:
    assert Rescheduler(naming(pair)).orders(view(A, B)) == []


def test_a_pair_that_is_busy_is_not_ordered_though_it_is_named() -> None:
    rescheduler = Rescheduler(naming(Pair("a", "b")), pace=PAPER)
    assert rescheduler.orders(view(A, B)) == [MoveOrder(Pair("a", "b"), 1, False)]
    assert rescheduler.orders(view(A, B)) == []


def test_an_instance_drains_whatever_the_rule() -> None:
    seen = view(A, B, C, draining="a")
    first, *others = Rescheduler(naming(Pair("b", "c"))).orders(seen)
    assert first.pair.source == "a" and others == [], "both others can't be in two moves"
    (order,) = Rescheduler(naming()).orders(seen)
    assert order.pair.source == "a" and order.moves == 3 and order.drains
    assert Rescheduler(naming(), drains=False).orders(seen) == []


def test_what_drains_goes_also_where_a_class_keeps_room() -> None:
    kept = InstanceLoad("b", 3, used_blocks=30, priorities={-1: 1})
    seen = view(A, kept, draining="a")
    (order,) = Rescheduler(terms=HIGH).orders(seen)
    assert order.pair == Pair("a", "b")
    found = room(seen, order.pair, HIGH)
    assert found is not None and found.blocks == 70
