"""A node with several API servers is one node: to clients, operators, other nodes and etcd."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.moves import Run, move, whole_text
from tests.kit.node import Node, Nodes, alive, descendants, llumnixctl
from tests.kit.wait import eventually

pytestmark = pytest.mark.cluster

COMPLETIONS = "/v1/completions"
SERVERS = 2
LIMIT = 12
# At 20 ms a step, long enough for whatever is done to it meanwhile.
LONG = {"prompt": "Once upon a time", "max_tokens": 300, "stream": True}


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[tuple[Node, Node]]:
    """A node with several API servers, and one with one; each has an instance."""
    folder = tmp_path_factory.mktemp("servers")
    nodes = Nodes(folder, etcd_member.endpoints, "servers", model)
    options = ("--migration-interval", "0.1", "--sim-profile", "cpu-steady", "--block-size", "16")
    servers = ("--api-server-count", str(SERVERS), "--max-requests", str(LIMIT))
    many = nodes.start("many", *options, *servers)
    other = nodes.start("other", *options)
    many.ready(240)
    other.ready(60)
    eventually(lambda: _all_serve(many), within=120)
    for node in (many, other):
        eventually(lambda node=node: node.instances() == ["many-0", "other-0"])
    yield many, other
    nodes.close()


@pytest.fixture(scope="module")
def right_text(one: Node) -> str:
    """What a client gets of the long request when nothing happens to it."""
    return whole_text(Run(one, COMPLETIONS, LONG).begin().end())


def _servers(node: Node) -> list[int]:
    """The processes of its API servers, in their order; those that have been started last."""
    found = dict(re.findall(r"API server (\d+) is process (\d+)", node.said))
    return [int(found[str(n)]) for n in range(SERVERS)] if len(found) == SERVERS else [0]


def _all_serve(node: Node) -> bool:
    """Whether each of them serves, also one that was started again."""
    started = re.findall(r"API server (\d+) is process", node.said)
    serving = re.findall(r"api server (\d+): serving", node.said)
    return len(set(started)) == SERVERS and sorted(started) == sorted(serving)


def _sockets(pid: int, state: str) -> int:
    """How many sockets a process has in a state of TCP: 01 is established."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    nodes = {fields[9] for line in lines if (fields := line.split())[3] == state}
    names = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return sum(name.removeprefix("socket:[").rstrip("]") in nodes for name in names)


def _streams(node: Node, each: int = 2) -> dict[int, list[Run]]:
    """Streams that run, at least so many at each server, by the server's process."""
    found: dict[int, list[Run]] = {pid: [] for pid in _servers(node)}
    while min(map(len, found.values())) < each:
        before = {pid: _sockets(pid, "01") for pid in found}
        run = Run(node, COMPLETIONS, LONG).begin()
        run.reach(1)
        (pid,) = [pid for pid in found if _sockets(pid, "01") > before[pid]]
        found[pid].append(run)
        assert sum(map(len, found.values())) < LIMIT, "one server gets nothing"
    for runs in found.values():
        for run in runs:
            run.reach(3)
    return found


def test_it_is_one_node(pair: tuple[Node, Node], right_text: str, etcd_member: EtcdCluster) -> None:
    many, other = pair
    before = many.metric("vllm:request_success_total")
    streams = [run for runs in _streams(many).values() for run in runs]
    for _ in range(4):  # whichever server answers
        eventually(lambda: many.metric("llumnix_open_requests") == len(streams))
        assert many.status["nodes"] == other.status["nodes"]
        assert len(many.get("/llumnix/requests").json) == len(streams)
    assert many.get("/health").status == many.get("/livez").status == 200
    listed = {r["instance"] for r in many.get("/llumnix/requests").json}
    assert listed == {"many-0", "other-0"}, "they dispatch to both nodes"
    assert [whole_text(run.end()) for run in streams] == [right_text] * len(streams)
    done = before + len(streams)
    eventually(lambda: many.metric("vllm:request_success_total") == done)
    dispatched = many.metric("llumnix_dispatches_total")
    assert dispatched >= len(streams)
    assert sum('engine="0"' in name for name in many.metrics() if "num_requests_running" in name)
    leases = etcd_member.ctl("get", "--prefix", "/llumnix/servers/nodes/", "--keys-only").split()
    assert leases == ["/llumnix/servers/nodes/many", "/llumnix/servers/nodes/other"]
    eventually(lambda: many.idle() and other.idle())


def test_limits_are_those_of_the_node(pair: tuple[Node, Node]) -> None:
    many, _ = pair
    streams = [run for runs in _streams(many).values() for run in runs]
    streams += [Run(many, COMPLETIONS, LONG).begin() for _ in range(LIMIT - len(streams))]
    eventually(lambda: many.metric("llumnix_open_requests") == LIMIT)
    for _ in range(6):
        refused = many.post(COMPLETIONS, {"model": "small", "prompt": "x", "max_tokens": 1})
        assert refused.status == 429, "whichever server it comes to"
    for run in streams:
        run.hang_up()
    eventually(lambda: many.metric("llumnix_open_requests") == 0)
    assert many.post(COMPLETIONS, {"model": "small", "prompt": "x", "max_tokens": 1}).status == 200


def test_requests_move_and_drain_by_any_of_them(pair: tuple[Node, Node], right_text: str) -> None:
    many, _ = pair
    streams = [run for runs in _streams(many).values() for run in runs]
    for run in streams:
        (found,) = run.requests()
        assert move(many, found)["outcome"] == "moved"
    unknown = many.post("/llumnix/migrate", {"request": "nobody", "to": "many-0"})
    assert unknown.status == 404 and "no request nobody" in unknown.error["message"]
    done = llumnixctl("drain", "many", "--wait", "60", "--url", many.url)
    assert done.returncode == 0, done.stderr
    try:
        eventually(lambda: "is drained" in many.get("/readyz").text)
        assert {r["instance"] for r in many.get("/llumnix/requests").json} <= {"other-0"}
        assert [whole_text(run.end()) for run in streams] == [right_text] * len(streams)
    finally:
        assert many.post("/llumnix/drain", {"name": "many", "cancel": True}).status == 200
    for _ in range(4):
        eventually(lambda: many.get("/readyz").status == 200)


def test_one_is_killed(pair: tuple[Node, Node], right_text: str) -> None:
    """Its own streams break off, and nothing else; another one takes its place."""
    many, other = pair
    victim, survivor = _servers(many)
    streams = _streams(many)
    os.kill(victim, signal.SIGKILL)
    left = {run.mark for run in streams[survivor]}
    took = eventually(
        lambda: all(
            any(mark in r["id"] for mark in left) for r in other.get("/llumnix/requests").json
        )
    )
    assert took < 3.0, "what it had asked for has ended"
    for run in streams[victim]:
        run.join(10.0)
        assert run.broken is not None
    assert [whole_text(run.end()) for run in streams[survivor]] == [right_text] * len(
        streams[survivor]
    )
    eventually(lambda: _servers(many)[0] != victim and _all_serve(many), within=120)
    more = _streams(many, each=1)
    assert survivor in more and victim not in more
    for run in [run for runs in more.values() for run in runs]:
        assert whole_text(run.end()) == right_text
    eventually(lambda: many.metric("llumnix_open_requests") == 0 and many.idle())
    assert many.metric("vllm:request_success_total") > 0


def test_the_other_node_dies(
    tmp_path: Path, etcd_member: EtcdCluster, cluster_name: str, model: str, right_text: str
) -> None:
    """Streams at instances of a node that is killed go on; then SIGTERM lets all of them end."""
    nodes = Nodes(tmp_path, etcd_member.endpoints, cluster_name, model)
    try:
        options = ("--sim-profile", "cpu-steady", "--block-size", "16")
        many = nodes.start("many", *options, "--api-server-count", str(SERVERS))
        other = nodes.start("other", *options)
        many.ready(240)
        other.ready(60)
        eventually(lambda: _all_serve(many), within=120)
        eventually(lambda: many.instances() == ["many-0", "other-0"])
        streams = [run for runs in _streams(many, each=3).values() for run in runs]
        assert any(r["instance"] == "other-0" for run in streams for r in run.requests())
        other.kill()
        eventually(lambda: len(many.get("/llumnix/requests").json) == len(streams))
        processes = descendants(many.pid)
        many.signal(signal.SIGTERM)
        assert [whole_text(run.end()) for run in streams] == [right_text] * len(streams)
        assert many.exit_code(30) == 0
        eventually(lambda: not alive(processes))
        assert etcd_member.ctl("get", "--prefix", f"/llumnix/{cluster_name}/nodes/") == ""
    finally:
        nodes.close()
