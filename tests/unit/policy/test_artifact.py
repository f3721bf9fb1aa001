"""The paper's artifact as a mode: where it differs from Algorithm 1."""

from math import inf

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.artifact import artifact, artifact_freeness, by_artifact
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import Candidate, Request
from llumnix.policy.load import freeness
from llumnix.policy.priority_classes import Classes, PriorityClass
from llumnix.policy.rebalance import UNCHECKED, Pair, room
from llumnix.policy.request_choice import Room

INFO = InstanceInfo("i", "n", "m", InstanceState.READY, 100, 16)
HIGH = Terms(classes=Classes({-1: PriorityClass("high", -1, target_tokens=20 * 16)}))


def moves(*loads: InstanceLoad) -> list[Pair]:
    return artifact(view(*loads), Terms(), lambda pair: True)


def view(*loads: InstanceLoad) -> ClusterView:
    infos = (InstanceInfo(i.instance, "n", "m", InstanceState.READY, 100, 16) for i in loads)
    return ClusterView(
        instances={info.id: info for info in infos}, loads={load.instance: load for load in loads}
    )


def test_the_whole_queue_counts_and_a_watermark() -> None:
    load = InstanceLoad("i", 4, 2, used_blocks=60, waiting_blocks=30, head_blocks=10)
    assert artifact_freeness(INFO, load, Terms()) == (99 - 90) / 5
    assert freeness(INFO, load) == (100 - 70) / 5
    assert artifact_freeness(INFO, InstanceLoad("i"), Terms()) == inf


def test_the_nth_lowest_is_paired_with_the_nth_highest() -> None:
    used = {"a": 95, "b": 80, "c": 20, "d": 10}
    loads = [InstanceLoad(i, 10, used_blocks=n) for i, n in used.items()]
    assert moves(*loads) == [Pair("a", "d", UNCHECKED), Pair("b", "c", UNCHECKED)]


def test_who_has_preempted_gives_and_does_not_take() -> None:
    free = InstanceLoad("a", 2, 1, used_blocks=10, preempted=1)
    assert moves(free, InstanceLoad("b", 2, used_blocks=10)) == [Pair("a", "b", UNCHECKED)]
    assert moves(free, InstanceLoad("b", 10, used_blocks=95)) == []


def test_nobody_looks_at_the_load_after_the_move() -> None:
    full, tight = InstanceLoad("a", 10, used_blocks=95), InstanceLoad("b", 9, used_blocks=60)
    assert room(view(full, tight), Pair("a", "b", UNCHECKED), Terms()) == Room(40)


def test_high_priority_gathers_and_the_rest_keeps_away() -> None:
    with_high = Candidate(INFO, InstanceLoad("i", 4, used_blocks=15, priorities={-1: 1}))
    without = Candidate(INFO, InstanceLoad("i", 4, used_blocks=15))
    high, normal = Request(16, 1, -1), Request(16, 1, 0)
    assert by_artifact(with_high, high, HIGH) > by_artifact(without, high, HIGH)
    assert by_artifact(with_high, normal, HIGH) < by_artifact(without, normal, HIGH)
