"""Each change of the cluster is one sentence."""

from dataclasses import replace

import pytest

from llumnix.cluster import ClusterView, InstanceInfo, InstanceState, NodeInfo
from llumnix.control.view import changes

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
