"""A whole node that wants keys: who gets in, and where the operators' token lies."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llumnix.entrypoints import ctl
from llumnix.secrecy import token_file
from tests.kit.etcd import EtcdCluster
from tests.kit.node import Answer, Node, Nodes
from tests.kit.wait import eventually

pytestmark = pytest.mark.cluster

BODY = {"model": "small", "prompt": "Hello", "max_tokens": 5, "temperature": 0}


class Locked:
    """A node of which clients need a key."""

    def __init__(self, node: Node, folder: Path, etcd: EtcdCluster) -> None:
        self.node = node
        self.state = folder / "locked"
        self.etcd = etcd
        self.file = token_file(str(self.state), "locked")

    @property
    def token(self) -> str:
        return self.file.read_text().strip()

    def ask(self, method: str, path: str, key: str = "", body: object = None) -> Answer:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.node.request(method, path, body, headers)

    def wants(self, number: int) -> None:
        self.etcd.ctl("put", "/llumnix/locked/desired/locked", str(number))


@pytest.fixture(scope="module")
def locked(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[Locked]:
    """The node, which has no instance to begin with."""
    folder = tmp_path_factory.mktemp("locked")
    nodes = Nodes(folder, etcd_member.endpoints, "locked", model)
    keys = folder / "keys"
    keys.write_text("alice:of-alice\n")
    options = ("--initial-instances", "0", "--api-key", "k1", "--api-key-file", str(keys))
    options += ("--root-path", "/api", "--enable-request-id-headers")
    yield Locked(nodes.start("locked", *options).up(60), folder, etcd_member)
    nodes.close()


def test_routes_are_judged_before_instances(locked: Locked) -> None:
    for key in ("", "k1", locked.token):
        for path in ("/v1/batches", "/nowhere", "/api/nowhere"):
            assert locked.ask("POST", path, key, BODY).status == 404
    assert locked.ask("POST", "/v1/completions", "k1", BODY).status == 503
    assert locked.ask("POST", "/v1/completions", "no", BODY).status == 401


def test_the_operators_token_lies_in_a_file_for_its_user(locked: Locked) -> None:
    assert stat.S_IMODE(locked.file.stat().st_mode) == 0o600
    assert str(locked.file) in locked.node.said and locked.token not in locked.node.said
    assert len(locked.token) > 30
    for path in locked.state.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_a_client_drains_nothing_and_an_operator_does(locked: Locked) -> None:
    for path in ("/llumnix/drain", "/api/llumnix/drain"):
        for key, status in (("", 401), ("k1", 403), ("of-alice", 403)):
            answer = locked.ask("POST", path, key, {"name": "locked"})
            assert answer.status == status and "for operators" in answer.error["message"]
    assert locked.ask("GET", "/llumnix/drain", locked.token).json == []
    assert _ctl(locked, "nodes").stdout.splitlines()[1].startswith("locked")
    failed = _ctl(locked, "nodes", LLUMNIX_ADMIN_TOKEN="k1")
    assert failed.returncode == 1 and "the key shown is a client's" in failed.stderr
    failed = _ctl(locked, "nodes", LLUMNIX_CLUSTER="other")
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1
    assert "give --admin-token-file, or set LLUMNIX_ADMIN_TOKEN" in failed.stderr


def test_a_token_that_etcd_has_lost_is_written_again(locked: Locked) -> None:
    key = "/llumnix/locked/admin-token"
    before = locked.etcd.ctl("get", key)
    assert locked.token in before
    locked.etcd.ctl("del", key)
    eventually(lambda: locked.etcd.ctl("get", key) == before, within=10)


def test_every_path_answers_with_the_root_path_and_without(locked: Locked) -> None:
    for path in ("/livez", "/status", "/metrics", "/llumnix/requests", "/v1/models"):
        one, other = (locked.ask("GET", place, locked.token) for place in (path, "/api" + path))
        assert one.status == other.status, path
        assert one.status == (503 if path == "/v1/models" else 200)
    assert locked.ask("GET", "/api/livez").status == 200
    assert locked.ask("GET", "/api/generate", "k1").status == 405
    assert locked.ask("GET", "/api/status", "k1").status == 403


def test_every_answer_has_its_request_id(locked: Locked) -> None:
    for path in ("/livez", "/status", "/nowhere", "/v1/models", "/llumnix/drain", "/generate"):
        headers = {"X-Request-Id": "mine", "Authorization": f"Bearer {locked.token}"}
        assert locked.node.request("GET", path, headers=headers).headers["X-Request-Id"] == "mine"
        assert len(locked.node.get(path).headers["X-Request-Id"]) == 32


def test_inference_wants_a_key_by_whatever_route(locked: Locked) -> None:
    locked.wants(1)
    eventually(lambda: locked.node.answers("/readyz"), within=60)
    tokenize = {"model": "small", "prompt": "Hello"}
    for root in ("", "/api"):
        for path in ("/v1/completions", "/invocations", "/generate", "/tokenize"):
            body = {"/tokenize": tokenize, "/generate": {"prompt": "Hello"}}.get(path, BODY)
            got = [locked.ask("POST", root + path, k, body).status for k in ("", "no", "k1")]
            assert got == [401, 401, 200], path
            assert locked.ask("POST", root + path, "of-alice", body).status == 200
    for path in ("/server_info", "/openapi.json", "/docs", "/load", "/metrics"):
        got = [locked.ask("GET", path, key).status for key in ("", "k1", locked.token)]
        assert got[:2] == [401, 403] and got[2] == (404 if path == "/server_info" else 200)
    load = {"endpoint-load-metrics-format": "TEXT"}
    for key in ("k1", locked.token):
        headers = load | {"Authorization": f"Bearer {key}"}
        answer = locked.node.request("POST", "/v1/completions", BODY, headers)
        told = "kv_cache_usage_perc=" in answer.headers.get("endpoint-load-metrics", "")
        assert answer.status == 200 and told == (key == locked.token)
    answer = locked.ask("POST", "/v1/completions", "k1", BODY)
    assert [k.lower() for k in answer.headers].count("x-request-id") == 1
    locked.wants(0)
    eventually(lambda: not locked.node.answers("/readyz"), within=30)
    assert locked.ask("POST", "/v1/batches", locked.token, BODY).status == 404
    assert locked.ask("POST", "/v1/embeddings", "k1", BODY).status == 404, "there is none here"
    assert locked.ask("POST", "/v1/completions", "k1", BODY).status == 503


def _ctl(locked: Locked, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llumnix.entrypoints.ctl", "--url", locked.node.url, *argv]
    root = str(Path(ctl.__file__).parents[2])
    known = {"LLUMNIX_STATE_DIR": str(locked.state), "LLUMNIX_CLUSTER": "locked"}
    env = {**os.environ, "PYTHONPATH": root, **known, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
