"""Two and three nodes on one etcd: together they are one server."""

import itertools
import json
import signal
import socket
import threading
import time
from collections import Counter
from typing import Any

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.moves import Run, fold
from tests.kit.node import Node, Nodes
from tests.kit.wait import eventually
from tests.system.cluster.test_life import Reader

pytestmark = pytest.mark.cluster

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LEASE = 6.0  # seconds: --lease-ttl


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": "Hello", "max_tokens": 20} | more


def dispatches(node: Node) -> Counter[str]:
    """How many requests the node has sent to each instance."""
    found: Counter[str] = Counter()
    for name, value in node.metrics().items():
        if name.startswith("llumnix_dispatches_total"):
            found[name.split('"')[1]] = int(value)
    return found


def test_each_sees_both(two: tuple[Node, Node]) -> None:
    for node in two:
        eventually(lambda node=node: {n["id"] for n in node.status["nodes"]} == {"near", "far"})
        assert node.instances() == ["far-0"]
    assert len({node.status["leader"] for node in two}) == 1


@pytest.mark.parametrize(
    "path, body",
    [
        (COMPLETIONS, completion(max_tokens=100)),
        (COMPLETIONS, completion(n=3)),
        (COMPLETIONS, completion(echo=True)),
        (COMPLETIONS, completion(prompt=["one", "two", "three"])),
        (COMPLETIONS, completion(stop=["e"])),
        (CHAT, {"model": "small", "messages": [{"role": "user", "content": "x"}], "seed": 1}),
        ("/generate", {"prompt": "Hello", "max_tokens": 30}),
    ],
    ids=["long", "n", "echo", "prompts", "stop", "chat", "demo"],
)
def test_the_answer_is_the_same_bytes(two: tuple[Node, Node], path: str, body: Any) -> None:
    if path == CHAT:
        body = body | {"max_tokens": 50}
    answers = [node.post(path, body) for node in two]
    assert [answer.status for answer in answers] == [200, 200], answers[0].text
    near, far = (_timeless(answer.json) for answer in answers)
    assert near == far
    eventually(two[1].idle)
    assert two[0].idle()


@pytest.mark.parametrize("path", [COMPLETIONS, "/generate"])
def test_so_is_the_stream(two: tuple[Node, Node], path: str) -> None:
    body = completion(max_tokens=100)
    if path == "/generate":
        del body["model"]
    ends = []
    for node in two:
        with node.stream(path, body) as stream:
            # How many tokens an event brings depends on how busy the machine is.
            if path == "/generate":
                events = [json.loads(line) for line in stream.response]
                texts = [event["text"][0] for event in events]
                assert all(after.startswith(text) for text, after in itertools.pairwise(texts))
                ends.append(events[-1])
            else:
                events = list(stream)
                ends.append(fold(events))
                assert ends[-1]["choices"][0]["finish_reason"] == "length"
            assert len(events) > 1
    assert ends[0] == ends[1]


def _timeless(answer: Any) -> Any:
    """Without what is new in each answer."""
    return {k: v for k, v in answer.items() if k not in ("id", "created")}


def test_a_cancellation_reaches_the_other_node(two: tuple[Node, Node]) -> None:
    near, far = two
    with near.stream(COMPLETIONS, completion(max_tokens=2000)) as stream:
        next(iter(stream))
        eventually(lambda: far.metric("llumnix_instance_used_blocks") > 0)
    # Uncancelled it would run for six seconds.
    eventually(lambda: far.idle() and near.idle(), within=3)


def test_bad_input_is_refused_where_it_arrives(two: tuple[Node, Node]) -> None:
    near, far = two
    sent = dispatches(near)
    assert near.post(COMPLETIONS, completion(prompt=[1] * 3000)).status == 400
    assert near.post(COMPLETIONS, completion(max_tokens=0)).status == 400
    assert dispatches(near) == sent and far.idle()


def test_what_the_far_engine_refuses_is_told(two: tuple[Node, Node]) -> None:
    near, far = two
    answer = near.post(COMPLETIONS, completion(logprobs=3))
    assert answer.status >= 400 and "logprobs" in answer.error["message"]
    assert near.idle() and far.idle()


def test_peers_need_the_clusters_token(two: tuple[Node, Node]) -> None:
    for header in ({}, {"Authorization": "Bearer guess"}):
        answer = two[1].request("GET", "/llumnix/peer", headers=header)
        assert answer.status == 401 and answer.error


def test_a_given_token_that_is_not_the_others(nodes: Nodes) -> None:
    near = nodes.start("near", "--initial-instances", "0", "--cluster-token", "one thing")
    far = nodes.start("far", "--cluster-token", "another").ready()
    eventually(lambda: near.answers("/livez") and near.instances() == ["far-0"], within=20)
    assert near.get("/readyz").status == 503
    eventually(lambda: "node far gets nothing: wrong token" in near.said, within=10)
    assert "another" not in far.said and "one thing" not in near.said


# ---- nodes that go and come ----


# A node without instances, whose requests do not wait long for one.
ALONE = ("--initial-instances", "0", "--failover-timeout", "2")


def test_a_killed_node(nodes: Nodes) -> None:
    """With no other instance, running requests end with an error, and new ones are refused."""
    near, far = nodes.start("near", *ALONE), nodes.start("far")
    near.ready(), far.ready()
    reader = Reader(near, body=completion(max_tokens=2000)).begin()
    waiting = Later(near, completion(max_tokens=2000))
    eventually(lambda: near.metric("llumnix_open_requests") == 2)
    far.kill()
    reader.join(LEASE)
    assert not reader.is_alive() and reader.refused
    answer = waiting.answer(within=LEASE)
    assert answer.status >= 500 and "node far" in answer.error["message"]
    began = time.monotonic()
    eventually(lambda: near.get("/readyz").status == 503, within=LEASE + 3)
    assert near.get("/readyz").text == "no instance is ready\n"
    refused = near.post(COMPLETIONS, completion())
    assert refused.status == 503 and refused.error["message"] == "no instance is ready"
    assert time.monotonic() - began < LEASE + 4
    assert near.idle()
    nodes.start("far").ready()
    near.ready()
    assert near.post(COMPLETIONS, completion()).status == 200


def test_a_demo_stream_that_fails_is_broken_off(nodes: Nodes) -> None:
    """What has begun as a success cannot end as an error, so it does not end well either."""
    near, far = nodes.start("near", *ALONE), nodes.start("far")
    near.ready(), far.ready()
    body = json.dumps({"prompt": "Hello", "max_tokens": 2000, "stream": True}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", near.port), timeout=2 * LEASE) as raw:
        raw.sendall(head.encode() + body)
        answer = raw.recv(65536)
        far.kill()
        while piece := raw.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1
    assert b'{"text":' in answer and not answer.endswith(b"0\r\n\r\n")
    eventually(near.idle)


def test_a_frozen_node(nodes: Nodes) -> None:
    """It is cut off, and when it thaws it is one of them again."""
    near, far = nodes.start("near", *ALONE), nodes.start("far")
    near.ready(), far.ready()
    reader = Reader(near, body=completion(max_tokens=2000)).begin()
    far.signal(signal.SIGSTOP)
    try:
        # Another instance is looked for until the lease of this one's node ends.
        reader.join(2 * LEASE)
        assert not reader.is_alive() and reader.refused
    finally:
        far.signal(signal.SIGCONT)
    eventually(lambda: near.post(COMPLETIONS, completion()).status == 200, within=LEASE + 4)
    eventually(far.idle)


def test_a_death_that_two_instances_share_costs_nobody_a_token(nodes: Nodes) -> None:
    """What had begun there goes on here, behind the tokens that its client has."""
    steady = ("--sim-profile", "cpu-steady")  # slow steps, and so less work in as much time
    near = nodes.start("near", *steady).ready()
    far = nodes.start("far", *steady).ready()
    eventually(lambda: len(near.instances()) == 2)
    # A node whose frontend has just opened may have been silent for so long that it is avoided.
    eventually(lambda: near.post(COMPLETIONS, completion()) and len(dispatches(near)) == 2)
    bodies = [completion(prompt=f"No. {n}", max_tokens=250, stream=True) for n in range(16)]
    runs = [Run(near, COMPLETIONS, body).begin() for body in bodies]
    for run in runs:
        eventually(lambda run=run: any(r["generated"] for r in run.requests()))
    assert min(dispatches(near).values()) >= 4
    far.kill()
    fresh = [Later(near, completion(prompt=f"new {n}")) for n in range(10)]
    assert [later.answer(within=4 * LEASE).status for later in fresh] == [200] * 10
    answers = [run.end() for run in runs]
    assert near.said.count("goes on elsewhere at token") >= 4
    again = [Later(near, body | {"stream": False}) for body in bodies]
    for one, other in zip(answers, again, strict=True):
        (streamed,), (whole,) = one["choices"], other.answer(within=60).json["choices"]
        assert streamed["text"] == whole["text"] and streamed["finish_reason"] == "length"
    eventually(near.idle)


def test_a_third_node_gets_its_share(nodes: Nodes) -> None:
    a, b = nodes.start("a"), nodes.start("b")
    a.ready(), b.ready()
    eventually(lambda: len(a.instances()) == 2)
    c = nodes.start("c").ready()
    eventually(lambda: all(len(node.instances()) == 3 for node in (a, b, c)))
    laters = [Later(a, completion(prompt=str(n), max_tokens=100)) for n in range(30)]
    assert {later.answer(within=20).status for later in laters} == {200}
    assert all(dispatches(a)[f"{name}-0"] >= 5 for name in "abc")
    # It goes, and what it has left to do comes to its end.
    readers = [Reader(a, body=completion(prompt=str(n), max_tokens=300)).begin() for n in range(9)]
    assert c.stop() == 0
    for reader in readers:
        reader.join(20.0)
        assert reader.done and not reader.refused
    eventually(lambda: len(a.instances()) == 2)
    assert a.post(COMPLETIONS, completion()).status == 200


@pytest.mark.parametrize("path", [COMPLETIONS, "/generate"])
def test_a_leaving_node_relays_to_the_end(nodes: Nodes, path: str) -> None:
    """Its client's requests run elsewhere: they too are waited for."""
    near, far = nodes.start("near", "--initial-instances", "0"), nodes.start("far")
    near.ready(), far.ready()
    body = completion(max_tokens=300)
    if path == "/generate":
        del body["model"]
    reader = Reader(near, path, body).begin()
    assert near.stop() == 0
    reader.join(20.0)
    assert reader.done, reader.broken
    if path == "/generate":
        assert json.loads(reader.lines[-1]) == far.post(path, body).json
    else:
        assert reader.lines[-2] == b"data: [DONE]\n"
    eventually(far.idle)


def test_instances_come_and_go_by_a_key(nodes: Nodes, etcd_member: EtcdCluster) -> None:
    node = nodes.start("a").ready()
    key = f"/llumnix/{nodes.cluster}/desired/a"
    etcd_member.ctl("put", key, "3")
    eventually(lambda: node.instances() == ["a-0", "a-1", "a-2"])
    reader = Reader(node, body=completion(max_tokens=400)).begin()
    etcd_member.ctl("put", key, "1")
    eventually(lambda: len(node.status["instances"]) == 1)
    reader.join(30.0)
    assert reader.done and not reader.refused
    assert node.post(COMPLETIONS, completion()).status == 200
    etcd_member.ctl("put", key, "0")
    eventually(lambda: node.get("/readyz").status == 503)
    assert node.post(COMPLETIONS, completion()).status == 503
    etcd_member.ctl("put", key, "many")
    etcd_member.ctl("put", key, "2")
    eventually(lambda: len(node.instances()) == 2)
    assert node.post(COMPLETIONS, completion()).status == 200
    etcd_member.ctl("del", key)
    assert node.stop() == 0


def test_a_drain_key_keeps_requests_away(nodes: Nodes, etcd_member: EtcdCluster) -> None:
    node = nodes.start("a", "--initial-instances", "2").ready()
    eventually(lambda: len(node.instances()) == 2)
    key = f"/llumnix/{nodes.cluster}/drain/a-0"
    etcd_member.ctl("put", key, "x")
    eventually(lambda: node.status["draining"] == ["a-0"])
    time.sleep(0.2)  # who dispatches is told at the same time, and may read it a little later
    for n in range(10):
        assert node.post(COMPLETIONS, completion(prompt=str(n))).status == 200
    assert set(dispatches(node)) == {"a-1"}
    etcd_member.ctl("del", key)
    eventually(lambda: node.status["draining"] == [])
    for n in range(10):
        assert node.post(COMPLETIONS, completion(prompt=str(n))).status == 200
    assert set(dispatches(node)) == {"a-0", "a-1"}


class Later:
    """A request that is answered while the test goes on."""

    def __init__(self, node: Node, body: Any, path: str = COMPLETIONS) -> None:
        self._answers: list[Any] = []
        self._thread = threading.Thread(
            target=lambda: self._answers.append(node.post(path, body, within=60.0)),
            daemon=True,
        )
        self._thread.start()

    def answer(self, within: float) -> Any:
        self._thread.join(within)
        assert self._answers, f"no answer after {within} s"
        return self._answers[0]


# ---- leaks ----


def test_two_hundred_cancellations_leave_nothing(nodes: Nodes) -> None:
    """Half of them across nodes, at every stage of a request."""
    near, far = nodes.start("near", "--initial-instances", "0"), nodes.start("far")
    near.ready(), far.ready()
    _cancel(near, far, 40)  # what is made on first use is there by now
    _quiet(near, far)
    before = [(n.descriptors(), n.threads()) for n in (near, far)]
    _cancel(near, far, 200)
    _quiet(near, far)
    for node, (descriptors, threads) in zip((near, far), before, strict=True):
        eventually(lambda n=node, d=descriptors: n.descriptors() <= d + 1)
        # A few of a pool may come later.
        eventually(lambda n=node, t=threads: n.threads() <= t + 6)
        assert "Traceback" not in node.said and "never retrieved" not in node.said
    assert near.post(COMPLETIONS, completion()).json["usage"]["completion_tokens"] == 20


def _cancel(near: Node, far: Node, number: int) -> None:
    def one(n: int) -> None:
        node = (near, far)[n % 2]
        body = completion(prompt=f"No. {n}", max_tokens=2000)
        with node.stream(COMPLETIONS, body) as stream:
            for _ in range(n % 5):
                stream.response.readline()

    for start in range(0, number, 20):
        threads = [threading.Thread(target=one, args=(n,)) for n in range(start, start + 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
            assert not thread.is_alive()


def _quiet(*nodes: Node) -> None:
    for node in nodes:
        eventually(node.idle, within=5)  # uncancelled, one would run for longer
