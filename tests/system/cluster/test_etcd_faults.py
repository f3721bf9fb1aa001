"""Two nodes on three members of etcd: whatever becomes of those, no request notices."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.node import Node, Nodes
from tests.kit.wait import eventually
from tests.system.cluster.test_life import Reader

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

COMPLETIONS = "/v1/completions"
TTL = 5.0
SHORT = {"model": "small", "prompt": "Hello", "max_tokens": 3}


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, etcd: EtcdCluster, model: str
) -> Iterator[tuple[Node, Node]]:
    """Two nodes with an instance each, which tests share."""
    nodes = Nodes(tmp_path_factory.mktemp("faults"), etcd.endpoints, "faults", model)
    near = nodes.start("near", "--lease-ttl", str(TTL))
    far = nodes.start("far", "--lease-ttl", str(TTL))
    yield near.ready(60), far.ready(60)
    nodes.close()


class Asking(threading.Thread):
    """Sends one short request after the other, and keeps every answer that is not a 200."""

    def __init__(self, node: Node) -> None:
        super().__init__(daemon=True)
        self._node, self._over = node, threading.Event()
        self.answered, self.failed = 0, list[str]()

    def run(self) -> None:
        while not self._over.wait(0.05):
            try:
                answer = self._node.post(COMPLETIONS, SHORT, within=30.0)
            except OSError as error:
                self.failed.append(str(error))
                continue
            self.answered += 1
            if answer.status != 200:
                self.failed.append(f"{answer.status}: {answer.text}")

    def end(self) -> None:
        self._over.set()
        self.join(45.0)
        assert not self.is_alive(), "a request hangs"


def quorum_lost(etcd: EtcdCluster) -> None:
    for i in (0, 1):
        etcd.freeze(i)
    time.sleep(TTL + 2)  # longer than every lease: the silence itself is the fault
    for i in (0, 1):
        etcd.thaw(i)


def wiped(etcd: EtcdCluster) -> None:
    etcd.restart_all(wipe=True)


def revoked(etcd: EtcdCluster) -> None:
    """The lease of one node: its keys are seen to go, so the other's instance serves alone."""
    key = etcd.ctl("get", "/llumnix/faults/nodes/far", "--write-out=json")
    etcd.ctl("lease", "revoke", f"{json.loads(key)['kvs'][0]['lease']:x}")


def whole(pair: tuple[Node, Node], etcd: EtcdCluster) -> bool:
    """Whether both nodes see all, and etcd holds what a third would need to join."""
    try:
        held = etcd.ctl("get", "--prefix", "--keys-only", "/llumnix/faults/").split()
    except (AssertionError, subprocess.TimeoutExpired):
        return False  # it does not answer yet
    return "/llumnix/faults/token" in held and "/llumnix/faults/nodes/far" in held and all(
        {n["id"] for n in status["nodes"]} == {"near", "far"}
        and [i["state"] for i in status["instances"]] == ["ready"] * 2
        and status["leader"] is not None
        and status["view_age_seconds"] < 2
        for status in (node.status for node in pair)
    )  # fmt: skip


@pytest.mark.parametrize("fault", [quorum_lost, wiped, revoked])
def test_no_request_notices(
    pair: tuple[Node, Node], etcd: EtcdCluster, fault: Callable[[EtcdCluster], None]
) -> None:
    body = SHORT | {"max_tokens": 1500}
    readers = [Reader(node, body=body).begin() for node in pair]
    asking = [Asking(node) for node in pair]
    for thread in asking:
        thread.start()
    fault(etcd)
    eventually(lambda: whole(pair, etcd), within=40, every=0.2)
    for thread in asking:
        enough = max(thread.answered, 3)
        eventually(lambda thread=thread, enough=enough: thread.answered > enough)
        thread.end()
        assert thread.failed == []
    for reader in readers:
        reader.join(60.0)
        assert reader.done and not reader.refused, reader.broken
        assert any(b'"finish_reason":"length"' in line for line in reader.lines[-6:])
    assert all(node.answers("/livez") for node in pair)


def test_nodes_write_little(pair: tuple[Node, Node], etcd: EtcdCluster) -> None:
    """Writes a second and node: what the revision grows by, and the keep-alives."""
    before, seconds = revision(etcd), 6.0
    time.sleep(seconds)  # what is measured is that nothing happens
    resting = (revision(etcd) - before) / seconds / 2
    readers = [Reader(node, body=SHORT | {"max_tokens": 1000}).begin() for node in pair]
    asking = [Asking(node) for node in pair]
    for thread in asking:
        thread.start()
    before, began = revision(etcd), time.monotonic()
    time.sleep(seconds)
    busy = (revision(etcd) - before) / (time.monotonic() - began) / 2
    for thread in asking:
        thread.end()
    for reader in readers:
        reader.join(60.0)
        assert reader.done
    kept = 1 / (6.0 / 3)  # keep-alives a second, at the default --lease-ttl
    print(f"\nwrites a second: {resting + kept:.2f} at rest, {busy + kept:.2f} under load")
    assert resting + kept <= 2 and busy + kept <= 6


def revision(etcd: EtcdCluster) -> int:
    status = etcd.ctl("endpoint", "status", "--write-out=fields")
    revisions = [line for line in status.splitlines() if line.startswith('"Revision"')]
    return max(int(line.rpartition(":")[2]) for line in revisions)
