"""Node processes add an instance under load and remove one at rest, and no client notices."""

import json
import threading
from typing import Any

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.moves import Run, whole_text
from tests.kit.node import Node, Nodes
from tests.kit.wait import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

COMPLETIONS = "/v1/completions"
CLIENTS = 12
# 256 blocks of 16 tokens in an instance: the clients of the test leave at most 21 to a request on
# one, and at least 37 on two. The two long requests leave at least 96 on one. The steps are slow,
# so that these last for long without many blocks and without much work.
OPTIONS = (
    *("--num-gpu-blocks-override", "256", "--block-size", "16", "--sim-profile", "cpu-steady"),
    *("--migration-interval", "0.1", "--autoscale"),
    *("--autoscale-low", "25", "--autoscale-high", "60", "--autoscale-period", "1"),
    *("--autoscale-cooldown", "1", "--autoscale-max", "2"),
)


class Load:
    """Clients that send a request after the other, each at most 5 blocks long."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._enough = threading.Event()
        self.texts: set[str] = set()
        self._broken: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        body = {"prompt": "Once upon a time", "max_tokens": 60, "stream": True}
        try:
            while not self._enough.is_set():
                run = Run(self._node, COMPLETIONS, body).begin()
                while run.is_alive() and not self._enough.is_set():
                    run.join(0.1)
                if run.is_alive():
                    run.hang_up()
                else:
                    self.texts.add(whole_text(run.end()))
        except BaseException as error:  # the test's own thread is to fail
            self._broken.append(error)

    def end(self) -> None:
        """All hang up."""
        self._enough.set()
        for thread in self._threads:
            thread.join(30.0)
            assert not thread.is_alive()
        assert not self._broken


def _one_on_each(node: Node, body: dict[str, Any]) -> list[Run]:
    """A request on each of the two instances, begun one after the other."""
    found: dict[str, Run] = {}
    others = []
    while len(found) < 2:
        assert len(others) < 30, f"all are on {list(found)}"
        run = Run(node, COMPLETIONS, body).begin()
        if found.setdefault(run.reach(1)[0]["instance"], run) is not run:
            others.append(run)  # which has the next one go elsewhere, sooner or later
    for run in others:
        run.hang_up()
    return list(found.values())


def test_instances_follow_the_load(nodes: Nodes, one: Node, etcd_member: EtcdCluster) -> None:
    left = nodes.start("left", *OPTIONS).ready(60)
    right = nodes.start("right", "--initial-instances", "0", *OPTIONS).ready(60)
    prefix = f"/llumnix/{nodes.cluster}/desired/"

    def desired(node: Node) -> str:
        return etcd_member.ctl("get", "--print-value-only", prefix + node.name).strip()

    long = {"prompt": "Once upon a time", "max_tokens": 500, "stream": True}
    undisturbed = whole_text(Run(one, COMPLETIONS, long).begin().end())
    load = Load(right)
    try:
        eventually(lambda: right.instances() == ["left-0", "right-0"], within=20)
        assert (desired(left), desired(right)) == ("", "1")
        runs = _one_on_each(left, long)
        eventually(lambda: load.texts)
    finally:
        load.end()
    eventually(lambda: desired(right) != "1", every=0.1)
    assert json.loads(desired(right)) == {"instances": 0, "without": "right-0"}
    eventually(lambda: [i["id"] for i in left.status["instances"]] == ["left-0"])
    assert all(run.is_alive() for run in runs), "the one has moved, and not just ended"
    assert [whole_text(run.end()) for run in runs] == [undisturbed] * 2
    assert len(load.texts) == 1, "all clients have got the same"
    said = [line for line in left.said.splitlines() if "epoch" in line and "desired" in line]
    print(*said, etcd_member.ctl("get", "--prefix", prefix), sep="\n")
    epoch = left.status["leader_epoch"]
    assert len(said) == 2, said
    assert f"epoch {epoch}: adds instances: desired are 1 on right, as the mean " in said[0]
    assert f"epoch {epoch}: removes right-0: desired are 0 on right, as the mean " in said[1]
    assert "moves a request from right-0 (drains)" in left.said


def test_the_next_leader_goes_on_from_what_is_desired(
    nodes: Nodes, etcd_member: EtcdCluster
) -> None:
    options = (*OPTIONS, "--autoscale-min", "2", "--autoscale-max", "3")
    # The fewest that there may be are there from the beginning, so that it does not matter how
    # long the second node takes to join.
    first = nodes.start("left", "--initial-instances", "2", *options).ready(60)
    second = nodes.start("right", "--initial-instances", "0", *options).ready(60)
    eventually(lambda: second.instances() == ["left-0", "left-1"], within=20)
    before = second.status["leader_epoch"]
    assert second.status["leader"] == "left"
    first.kill()
    eventually(lambda: second.instances() == ["right-0", "right-1"], within=40)
    epoch = second.status["leader_epoch"]
    assert epoch > before
    added = f"epoch {epoch}: adds instances: desired are 2 on right, as 0 in the cluster are fewer"
    assert added in second.said
    again = nodes.start("left", "--initial-instances", "1", *options).ready(60)
    # Three are more than nobody's requests need, and two the fewest that there may be.
    eventually(lambda: f"epoch {epoch}: removes " in second.said, within=20)
    eventually(lambda: len(again.status["instances"]) == 2, within=20)
    assert second.said.count(": removes ") == 1
    eventually(lambda: again.metric("llumnix_mean_freeness") == 2 * 256, within=5)
    assert again.metrics()['llumnix_desired_instances{node="right"}'] in (1, 2)
