"""Requests of two node processes move: by hand with llumnixctl, and by themselves."""

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from llumnix.entrypoints import ctl
from tests.kit.etcd import EtcdCluster, free_ports
from tests.kit.moves import Run, whole_text
from tests.kit.node import Node, Nodes, llumnixctl
from tests.kit.wait import eventually

pytestmark = pytest.mark.cluster

COMPLETIONS = "/v1/completions"
CLUSTER = "moves"
# At 20 ms a step, long enough for whatever is done to it meanwhile.
LONG = {"prompt": "Once upon a time", "max_tokens": 300, "stream": True}


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[tuple[Node, Node]]:
    """Two nodes with an instance each; the first leads."""
    folder = tmp_path_factory.mktemp("moves")
    nodes = Nodes(folder, etcd_member.endpoints, CLUSTER, model)
    options = ("--migration-interval", "0.1", "--sim-profile", "cpu-steady", "--block-size", "16")
    left = nodes.start("left", *options).ready(60)
    right = nodes.start("right", *options).ready(60)
    for node in (left, right):
        eventually(lambda node=node: node.instances() == ["left-0", "right-0"])
    yield left, right
    nodes.close()


@pytest.fixture(scope="module")
def right_text(one: Node) -> str:
    """What a client gets of the long request when it does not move; of a node that is swift."""
    return whole_text(Run(one, COMPLETIONS, LONG).begin().end())


def _other(instance: str) -> str:
    return {"left-0": "right-0", "right-0": "left-0"}[instance]


# ---- by hand ----


def test_a_stream_is_moved_to_the_other_node_and_back(
    pair: tuple[Node, Node], right_text: str
) -> None:
    run = Run(pair[0], COMPLETIONS, LONG).begin()
    (found,) = run.reach(20)
    for _ in range(2):
        here = found["instance"]
        done = llumnixctl("migrate", found["id"], "--to", _other(here), "--url", pair[1].url)
        assert done.returncode == 0 and not done.stderr, done.stderr
        names, values = done.stdout.splitlines()
        report = dict(zip(names.split(), values.split(), strict=True))
        assert (report["SOURCE"], report["DESTINATION"]) == (here, _other(here))
        assert report["OUTCOME"] == "moved" and int(report["BLOCKS_SENT"]) > 0
        # More than a block later, as the place it comes from has all that it had.
        (found,) = run.reach(found["generated"] + 20)
        assert found["instance"] == _other(here)
    assert whole_text(run.end()) == right_text
    for node in pair:
        eventually(node.idle, within=3)
        assert node.metric("llumnix_migrations_total") >= 1


@pytest.fixture
def running(pair: tuple[Node, Node]) -> Iterator[dict[str, Any]]:
    """A request that is under way, as the cluster lists it, and that is cancelled afterwards."""
    with pair[0].stream(COMPLETIONS, LONG) as events:
        next(iter(events))
        yield pair[0].get("/llumnix/requests").json[0]
    for node in pair:
        eventually(node.idle, within=3)


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert ctl.main([*argv, "-o", "json"]) == 0
    return orjson.loads(capsys.readouterr().out)


def test_what_requests_there_are(
    pair: tuple[Node, Node], running: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for node in pair:
        (listed,) = _json(capsys, "requests", "--url", node.url)
        same = ("id", "instance", "node", "priority")
        assert {k: listed[k] for k in same} == {k: running[k] for k in same}
        assert listed["state"] == "running" and listed["generated"] >= running["generated"]
    assert ctl.main(["--url", pair[0].url, "requests"]) == 0
    names, values = capsys.readouterr().out.splitlines()
    assert names.split() == [name.upper() for name in running]
    assert values.split()[:3] == [running["id"], running["instance"], running["node"]]


def test_what_instances_there_are(
    pair: tuple[Node, Node], running: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Any] = []

    def reported() -> bool:
        found[:] = _json(capsys, "instances", "--url", pair[1].url)
        return sum((each["load"] or {}).get("running", 0) for each in found) == 1

    eventually(reported)
    assert [(i["id"], i["node"], i["state"], i["model"]) for i in found] == [
        ("left-0", "left", "ready", "small"),
        ("right-0", "right", "ready", "small"),
    ]
    assert ctl.main(["instances", "--url", pair[0].url]) == 0
    names, *rows = capsys.readouterr().out.splitlines()
    assert names.split()[:3] == ["ID", "NODE", "STATE"] and "RUNNING" in names
    assert [row.split()[0] for row in rows] == ["left-0", "right-0"]


def test_what_nodes_there_are(
    pair: tuple[Node, Node], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLUMNIX_URL", f"127.0.0.1:{pair[1].port}")
    found = _json(capsys, "nodes")
    assert [(n["id"], n["address"], n["leads"]) for n in found] == [
        ("left", f"127.0.0.1:{pair[0].port}", True),
        ("right", f"127.0.0.1:{pair[1].port}", False),
    ]


def test_no_requests_are_none(pair: tuple[Node, Node], capsys: pytest.CaptureFixture[str]) -> None:
    eventually(lambda: pair[0].idle() and pair[1].idle())
    assert ctl.main(["requests", "--url", pair[0].url]) == 0
    assert capsys.readouterr().out == "none\n"
    assert _json(capsys, "requests", "--url", pair[0].url) == []


@pytest.mark.parametrize("what", ["request", "instance", "the place it is at", "node"])
def test_what_cannot_be_moved(
    pair: tuple[Node, Node],
    running: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    """Exit status 1, and one sentence that says why."""
    here, url = running["instance"], pair[0].url
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    request, to, url, why = {
        "request": ("nonesuch", "left-0", url, "there is no request nonesuch"),
        "instance": (running["id"], "left-9", url, "there is no instance left-9"),
        "the place it is at": (running["id"], here, url, f"is at {here} already"),
        "node": (running["id"], "left-0", nobody, f"no node answers at {nobody}"),
    }[what]
    assert ctl.main(["migrate", request, "--to", to, "--url", url]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("llumnixctl: ") and said.err.count("\n") == 1
    assert why in said.err


@pytest.mark.parametrize("body", [b"{", {"request": "r"}, {"request": 1, "to": "left-0"}, []])
def test_a_body_that_asks_for_no_move(pair: tuple[Node, Node], body: Any) -> None:
    answer = pair[0].post("/llumnix/migrate", body)
    assert answer.status == 400 and answer.error["message"]


def test_unknown_ids_are_not_found(pair: tuple[Node, Node]) -> None:
    for body in ({"request": "x", "to": "left-0"}, {"request": "x", "to": "left-9"}):
        assert pair[0].post("/llumnix/migrate", body).status == 404


# ---- by themselves ----


@pytest.mark.parametrize("name", ["left-0", "left"])
def test_what_is_drained_is_emptied_while_streams_go_on(
    pair: tuple[Node, Node], etcd_member: EtcdCluster, right_text: str, name: str
) -> None:
    """An instance, or a whole node, whose API server goes on to serve."""
    key = f"/llumnix/{CLUSTER}/drain/{name}"
    runs = [Run(node, COMPLETIONS, LONG).begin() for node in (*pair, *pair, *pair)]
    for run in runs:
        run.reach(5)
    eventually(lambda: "left-0" in {r["instance"] for run in runs for r in run.requests()})
    etcd_member.ctl("put", key, "")
    try:
        for run in runs:
            eventually(lambda run=run: [r["instance"] for r in run.requests()] == ["right-0"])
            assert run.is_alive(), "it has moved, and not just ended"
        assert [whole_text(run.end()) for run in runs] == [right_text] * len(runs)
    finally:
        etcd_member.ctl("del", key)
    assert "moves" in pair[0].said and "left-0 (drains)" in pair[0].said
