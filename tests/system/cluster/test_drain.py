"""A node or an instance is emptied under streams with llumnixctl, and takes requests again."""

import time
from collections.abc import Iterator

import pytest

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.entrypoints import ctl
from llumnix.server.drain_routes import left
from tests.kit.etcd import EtcdCluster
from tests.kit.moves import Run, whole_text
from tests.kit.node import Node, Nodes, llumnixctl
from tests.kit.wait import eventually

pytestmark = pytest.mark.cluster

COMPLETIONS = "/v1/completions"
# At 20 ms a step, long enough for whatever is done to it meanwhile.
LONG = {"prompt": "Once upon a time", "max_tokens": 350, "stream": True}
BRIEF = LONG | {"max_tokens": 100}


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[tuple[Node, Node]]:
    """Two nodes with an instance each."""
    folder = tmp_path_factory.mktemp("drain")
    nodes = Nodes(folder, etcd_member.endpoints, "drain", model)
    options = ("--migration-interval", "0.1", "--sim-profile", "cpu-steady", "--block-size", "16")
    left = nodes.start("left", *options).ready(60)
    right = nodes.start("right", *options).ready(60)
    for node in (left, right):
        eventually(lambda node=node: node.instances() == ["left-0", "right-0"])
    yield left, right
    nodes.close()


@pytest.mark.parametrize("name", ["left", "left-0"])
def test_a_drain_empties_by_moving_and_can_be_cancelled(
    pair: tuple[Node, Node], one: Node, name: str
) -> None:
    undisturbed, briefly = (
        whole_text(Run(one, COMPLETIONS, body).begin().end()) for body in (LONG, BRIEF)
    )
    runs = [Run(node, COMPLETIONS, LONG).begin() for node in (*pair, *pair, *pair)]
    for run in runs:
        run.reach(5)
    assert "left-0" in {r["instance"] for run in runs for r in run.requests()}
    done = llumnixctl("drain", name, "--url", pair[1].url, "--wait", "60")
    print(f"$ llumnixctl drain {name}\n{done.stderr}{done.stdout}")
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert told[-1] == f"requests left at {name}: 0"
    names, values = done.stdout.splitlines()
    kind = "node" if name == "left" else "instance"
    assert names.split() == ["NAME", "KIND", "DRAINED", "LEFT"]
    assert values.split() == [name, kind, "True", "0"]
    try:
        assert all(run.is_alive() for run in runs), "they have moved, and not just ended"
        ready = pair[0].get("/readyz")
        if name == "left":
            assert ready.status == 503 and "left is drained" in ready.text
        else:
            assert ready.status == 200
        assert pair[0].get("/health").status == pair[1].get("/readyz").status == 200
        more = Run(pair[0], COMPLETIONS, LONG).begin()
        assert more.reach(1)[0]["instance"] == "right-0", "its API server goes on to serve"
        assert [whole_text(run.end()) for run in (*runs, more)] == [undisturbed] * 7
    finally:
        back = llumnixctl("drain", name, "--cancel", "--url", pair[0].url)
    assert back.returncode == 0 and back.stdout.splitlines()[1].split()[2] == "False"
    for node in pair:
        eventually(lambda node=node: not node.status["draining"])
    time.sleep(0.2)  # who dispatches is told at the same time, and may read it a little later
    assert pair[0].get("/readyz").status == 200
    again = [Run(pair[1], COMPLETIONS, BRIEF).begin() for _ in range(4)]
    assert "left-0" in {run.reach(1)[0]["instance"] for run in again}
    assert [whole_text(run.end()) for run in again] == [briefly] * 4


def test_what_cannot_move_is_told_by_name(
    pair: tuple[Node, Node], etcd_member: EtcdCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """With nowhere to go, requests stay where they are, and the command says which."""
    etcd_member.ctl("put", "/llumnix/drain/drain/right-0", "")
    eventually(lambda: pair[0].status["draining"] == ["right-0"])
    time.sleep(0.2)  # as above
    run = Run(pair[0], COMPLETIONS, LONG | {"max_tokens": 250}).begin()
    try:
        (found,) = run.reach(1)
        assert found["instance"] == "left-0"
        assert ctl.main(["drain", "left-0", "--wait", "0.2", "--url", pair[0].url]) == 1
        said = capsys.readouterr().err.splitlines()
        assert said[0] == "requests left at left-0: 1"
        assert said[-1].startswith(
            "llumnixctl: left-0 is drained, but requests are left there after 0.2 s: "
        )
        assert found["id"] in said[-1]
        assert {d["name"] for d in pair[0].get("/llumnix/drain").json} == {"left-0", "right-0"}
        assert ctl.main(["drain", "right-0", "--cancel", "--url", pair[0].url]) == 0
        eventually(lambda: [r["instance"] for r in run.requests()] == ["right-0"])
        whole_text(run.end())
    finally:
        for name in ("left-0", "right-0"):
            etcd_member.ctl("del", f"/llumnix/drain/drain/{name}")
        eventually(lambda: not pair[0].status["draining"] and not pair[1].status["draining"])


def test_names_that_are_none(pair: tuple[Node, Node]) -> None:
    url = "/llumnix/drain"
    there = "the nodes left, right and the instances left-0, right-0"
    assert there in pair[0].post(url, {"name": "middle"}).error["message"]
    assert pair[0].post(url, {"name": "middle"}).status == 404
    answer = pair[0].post(url, {"name": "left", "cancel": True})
    assert answer.status == 404 and "left is not drained" in answer.error["message"]
    for body in (b"{", [], {"nme": "left"}, {"name": 3}, {"name": "left", "cancel": "yes"}):
        assert pair[0].post(url, body).status == 400
    assert pair[0].request("DELETE", url).status == 405
    assert pair[0].status["draining"] == []


def test_what_is_left_where() -> None:
    state = InstanceState.READY
    view = ClusterView(
        nodes={"a": NodeInfo("a", "h:1", "", 1)},
        instances={f"a-{n}": InstanceInfo(f"a-{n}", "a", "m", state, 9, 16) for n in (0, 1)},
        loads={"a-1": InstanceLoad("a-1", running=2, waiting=1)},
        draining=frozenset({"a"}),
    )
    listed = [
        {"id": "r", "node": "a", "instance": "a-0", "stuck": None},
        {"id": "s", "node": "a", "instance": "a-0", "stuck": "its prompt has no token ids"},
    ]
    assert left(view, "a", listed) == {
        "name": "a",
        "kind": "node",
        "drained": True,
        "left": 2,
        "requests": ["r", "s"],
        "stuck": {"s": "its prompt has no token ids"},
    }
    # The node did not answer: what it last reported counts.
    assert (left(view, "a", [])["left"], left(view, "a-0", [])["left"]) == (3, 0)
