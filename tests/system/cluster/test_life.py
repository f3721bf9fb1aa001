"""How a node starts and how it ends, and what it leaves behind: nothing."""

import json
import os
import re
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.kit.etcd import EtcdCluster, free_ports
from tests.kit.node import HOST, Node, Nodes, alive, descendants
from tests.kit.wait import eventually

pytestmark = pytest.mark.cluster

COMPLETIONS = "/v1/completions"
LONG = {"model": "small", "prompt": "Hello", "max_tokens": 200}


def keys(etcd: EtcdCluster, nodes: Nodes) -> list[str]:
    """The cluster's keys that a node's life leaves in etcd."""
    lines = etcd.ctl("get", "--prefix", "--keys-only", f"/llumnix/{nodes.cluster}/").split()
    return [line for line in lines if not line.endswith("/token")]


class Reader(threading.Thread):
    """Reads a stream to its end beside the test."""

    def __init__(self, node: Node, path: str = COMPLETIONS, body: Any = None) -> None:
        super().__init__(daemon=True)
        self.node, self.path, self.body = node, path, body or LONG
        self.begun = threading.Event()
        self.lines: list[bytes] = []
        self.done = False
        self.broken: Exception | None = None

    def run(self) -> None:
        try:
            with self.node.stream(self.path, self.body) as stream:
                for line in stream.response:
                    self.lines.append(line)
                    self.begun.set()
                self.done = True
        except Exception as error:
            self.broken = error
        finally:
            self.begun.set()

    @property
    def refused(self) -> bool:
        """Whether the stream told an error."""
        return any(line.startswith(b'data: {"error"') for line in self.lines)

    def begin(self) -> "Reader":
        self.start()
        assert self.begun.wait(30.0) and self.broken is None, self.broken
        return self


def test_an_embedded_etcd_lives_and_ends_with_its_node(nodes: Nodes) -> None:
    node = nodes.start("a", endpoints=[]).ready()
    assert "An embedded etcd answers this user alone, at unix://" in node.said
    family = descendants(node.pid)
    assert family, "etcd is a child"
    with node.stream(COMPLETIONS, LONG) as stream:
        assert stream.text()
    assert node.stop() == 0
    eventually(lambda: not alive(family))
    assert "the node has left the cluster" in node.said
    assert "Traceback" not in node.said and "Task exception" not in node.said
    again = nodes.start("a", endpoints=[]).ready()
    assert again.post(COMPLETIONS, LONG).status == 200
    assert again.stop() == 0


def test_a_killed_nodes_etcd_ends_too(nodes: Nodes) -> None:
    node = nodes.start("a", endpoints=[]).ready()
    family = descendants(node.pid)
    node.kill()
    eventually(lambda: not alive(family), within=1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_may_end(nodes: Nodes, etcd_member: EtcdCluster, number: signal.Signals) -> None:
    node = nodes.start("a").ready()
    readers = [Reader(node).begin(), Reader(node, "/generate", {**LONG, "model": None})]
    del readers[1].body["model"]
    readers[1].begin()
    assert f"/llumnix/{nodes.cluster}/instances/a-0" in keys(etcd_member, nodes)
    node.signal(number)
    eventually(lambda: "finishing what runs" in node.said)
    eventually(lambda: not node.answers("/livez"))
    assert node.exit_code() == 0
    for reader in readers:
        reader.join(30.0)
        assert reader.done, reader.broken
    assert readers[0].lines[-2:] == [b"data: [DONE]\n", b"\n"]
    # How many tokens an event brings depends on how busy the machine is.
    assert any(b'"finish_reason":"length"' in line for line in readers[0].lines)
    texts = [json.loads(line)["text"][0] for line in readers[1].lines]
    assert len(texts) > 10 and len(texts[-1]) > len(texts[9])
    assert keys(etcd_member, nodes) == []
    assert "Traceback" not in node.said


def test_the_drain_timeout_bounds_it(nodes: Nodes, etcd_member: EtcdCluster) -> None:
    node = nodes.start("a", "--drain-timeout", "0.5").ready()
    reader = Reader(node, body={**LONG, "max_tokens": 2000}).begin()
    assert node.stop() == 0
    reader.join(30.0)
    assert re.search(r"the drain timeout ends \d requests: cmpl-\S+", node.said)
    assert keys(etcd_member, nodes) == []


def test_a_second_signal_ends_at_once(nodes: Nodes) -> None:
    node = nodes.start("a", endpoints=[]).ready()
    family = descendants(node.pid)
    Reader(node, body={**LONG, "max_tokens": 2000}).begin()
    node.signal(signal.SIGTERM)
    eventually(lambda: "finishing what runs" in node.said)
    node.signal(signal.SIGTERM)
    assert node.exit_code(5.0) == 128 + signal.SIGTERM
    assert "ending at once" in node.said
    eventually(lambda: not alive(family))


def test_a_node_that_is_stopped_while_it_starts(nodes: Nodes, etcd_member: EtcdCluster) -> None:
    node = nodes.start("a", "--initial-instances", "3").up()
    assert node.stop() == 0
    assert keys(etcd_member, nodes) == []
    assert "Traceback" not in node.said


def last_line(node: Node) -> str:
    """What it said at the end, without time and level."""
    return node.said.strip().splitlines()[-1].split(" ERROR ")[-1]


def test_a_port_that_is_taken(nodes: Nodes, etcd_member: EtcdCluster) -> None:
    with socket.create_server((HOST, 0)) as taken:
        node = nodes.start("a", port=taken.getsockname()[1])
        assert node.exit_code() == 1
    assert last_line(node).startswith("the node cannot start: ")
    assert "address already in use" in last_line(node)
    assert "Traceback" not in node.said
    assert keys(etcd_member, nodes) == []


def test_an_etcd_that_does_not_answer(nodes: Nodes) -> None:
    node = nodes.start("a", endpoints=[f"{HOST}:{free_ports(1)[0]}"])
    assert node.exit_code(30.0) == 1
    assert last_line(node).startswith("the node cannot start: ")
    assert "Traceback" not in node.said


def test_a_model_that_is_none(nodes: Nodes, tmp_path: Path) -> None:
    nodes.model = str(tmp_path / "nothing")
    node = nodes.start("a")
    assert node.exit_code() == 2
    assert "Traceback" not in node.said
    assert str(tmp_path / "nothing") in last_line(node)


def test_its_state_is_where_it_was_told(nodes: Nodes) -> None:
    node = nodes.start("a", endpoints=[]).ready()
    assert sorted(os.listdir(nodes.folder / "a")) == ["etcd"]
    assert node.stop() == 0
