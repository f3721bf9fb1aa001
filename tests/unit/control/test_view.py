"""What etcd lacks stays for its time; each change of the cluster is one sentence."""

from dataclasses import replace

import pytest

from llumnix.cluster import ClusterView, InstanceInfo, InstanceState, NodeInfo
from llumnix.control.etcd.types import KeyValue
from llumnix.control.view import Grace, changes

NODE = NodeInfo("a", "10.0.0.1:1", "1", 7)
INSTANCE = InstanceInfo("a-0", "a", "m", InstanceState.STARTING, 0, 16)
NONE = ClusterView()
NODES = replace(NONE, nodes={"a": NODE})
STARTS = replace(NODES, instances={"a-0": INSTANCE})
READY = replace(STARTS, instances={"a-0": replace(INSTANCE, state=InstanceState.READY)})
LED = replace(READY, leader="a", leader_epoch=12)

CASES = [
    (NONE, NODES, "Node a has joined, at 10.0.0.1:1."),
    (NODES, NONE, "Node a has left."),
    (NODES, replace(NONE, nodes={"a": replace(NODE, epoch=8)}), "Node a has been started anew, at"),
    (NODES, STARTS, "Instance a-0 of node a has joined: starting."),
    (STARTS, READY, "Instance a-0 of node a is ready."),
    (READY, NODES, "Instance a-0 of node a has left."),
    (READY, LED, "Node a leads, in epoch 12."),
    (LED, READY, "Nobody leads, after node a in epoch 12."),
    (LED, replace(LED, leader="b", leader_epoch=15), "Node b leads, in epoch 15."),
]


@pytest.mark.parametrize(("old", "new", "sentence"), CASES, ids=[case[2] for case in CASES])
def test_a_change_is_a_sentence(old: ClusterView, new: ClusterView, sentence: str) -> None:
    (said,) = changes(old, new)
    assert said.startswith(sentence)


def test_what_stays_is_not_spoken_of() -> None:
    assert not list(changes(LED, replace(LED, revision=99)))


def items(*names: str, revision: int = 1) -> dict[str, KeyValue]:
    return {name: KeyValue(name, b"1", revision, revision) for name in names}


def grace() -> Grace:
    return Grace(6.0, lambda key: key != "leader")


def test_what_a_list_lacks_is_kept_for_its_time() -> None:
    kept = grace()
    assert kept.after_list(items("a", "b", "leader"), 0.0).keys() == {"a", "b", "leader"}
    assert kept.after_list({}, 10.0) == items("a", "b"), "who leads is never kept"
    assert not kept.is_over(15.9) and kept.is_over(16.0)
    assert kept.end() == {} and not kept.is_over(99.0)


def test_who_comes_back_in_time_stays() -> None:
    kept = grace()
    kept.after_list(items("a", "b"), 0.0)
    kept.after_list({}, 10.0)
    new = items("a", revision=2)
    assert kept.after_events(new, (), 11.0) == new | items("b")
    assert kept.kept == {"b"}
    assert kept.end() == new


def test_a_deletion_that_was_seen_is_believed() -> None:
    kept = grace()
    kept.after_list(items("a", "b"), 0.0)
    assert kept.after_events(items("b"), {"a"}, 1.0) == items("b")
    kept.after_list({}, 2.0)
    assert kept.after_events({}, {"b"}, 8.0) == {}, "also of one that came and went in between"


def test_but_not_right_after_an_outage() -> None:
    """The leases that nobody could prolong end when etcd is back."""
    kept = grace()
    kept.after_list(items("a", "b", "leader"), 0.0)
    kept.after_list(items("a", "b", "leader"), 10.0)
    assert kept.after_events({}, {"a", "b", "leader"}, 10.1) == items("a", "b")
    new = items("a", revision=2)
    assert kept.after_events(new, (), 10.4) == new | items("b")
    assert not kept.is_over(16.0) and kept.is_over(16.1)
    assert kept.end() == new


def test_another_outage_gives_the_whole_time_again() -> None:
    kept = grace()
    kept.after_list(items("a"), 0.0)
    kept.after_list({}, 10.0)
    assert kept.after_list({}, 15.0) == items("a")
    assert not kept.is_over(20.9) and kept.is_over(21.0)
