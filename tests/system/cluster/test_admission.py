"""What is beyond the limits is refused at once, and clients that do not read harm nobody else."""

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.moves import Run
from tests.kit.node import HOST, Node, Nodes
from tests.kit.wait import eventually

pytestmark = pytest.mark.cluster

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LIMIT = 8
TOKENS = 400


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": "Hello", "max_tokens": 1500} | more


@pytest.fixture(scope="module")
def full(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[Node]:
    """A node that has room for few requests."""
    nodes = Nodes(tmp_path_factory.mktemp("full"), etcd_member.endpoints, "full", model)
    limits = ("--max-requests", str(LIMIT), "--max-prompt-tokens", str(TOKENS))
    stored = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    yield nodes.start("full", *limits, environment=stored).ready(60)
    nodes.close()


def _open(node: Node, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
    """A request on its way, whose answer nobody reads."""
    connection = http.client.HTTPConnection(HOST, node.port, timeout=30)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def _holds(node: Node, requests: int) -> None:
    eventually(lambda: node.metric("llumnix_open_requests") == requests)


def _takes(node: Node, count: int = LIMIT) -> None:
    """Whether the whole room is free."""
    eventually(node.idle)
    taken = [
        _open(node, COMPLETIONS, completion(max_tokens=2000, stream=True)) for _ in range(count)
    ]
    _holds(node, count)
    for connection in taken:
        connection.close()
    eventually(node.idle)


@pytest.mark.parametrize("n", [1, LIMIT])
def test_beyond_the_limit_of_requests(full: Node, n: int) -> None:
    before = full.metric("llumnix_refusals_total")
    body = completion(n=n, max_tokens=2000, stream=True)
    held = [_open(full, COMPLETIONS, body) for _ in range(LIMIT // n)]
    _holds(full, LIMIT)
    chat = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    refused = [
        full.post(COMPLETIONS, completion(max_tokens=5)),
        full.post(COMPLETIONS, completion(max_tokens=5, stream=True)),
        full.post(CHAT, chat),
        full.post(CHAT, chat | {"stream": True}),
        full.post("/generate", {"prompt": "Hello", "max_tokens": 5}),
        full.post(COMPLETIONS, completion(prompt="x" * 1_000_000)),
        full.post("/tokenize", {"model": "small", "prompt": "Hello"}),
    ]
    for answer in refused:
        assert answer.status == 429 and answer.seconds < 3.0
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.error["code"] == 429 and f"{LIMIT} requests" in answer.error["message"]
    for path in ("/v1/models", "/health", "/readyz", "/livez", "/metrics", "/status"):
        assert full.get(path).status == 200
    assert full.metric("llumnix_refusals_total") == before + len(refused)
    for connection in held:
        connection.close()
    eventually(full.idle)
    assert full.post(COMPLETIONS, completion(max_tokens=5)).status == 200


def test_answers_in_the_background_have_their_slots_until_they_end(full: Node) -> None:
    body = {"model": "small", "input": "Hello", "max_output_tokens": 1800, "background": True}
    eventually(full.idle)
    answers = [full.post("/v1/responses", body) for _ in range(LIMIT + 2)]
    assert [a.status for a in answers] == [200] * LIMIT + [429] * 2
    assert full.metric("llumnix_open_requests") == LIMIT
    assert full.post(COMPLETIONS, completion(max_tokens=5)).status == 429
    for answer in answers[:LIMIT]:
        response = answer.json["id"]
        assert full.post(f"/v1/responses/{response}/cancel", {}).status == 200
    eventually(full.idle)
    assert full.post("/v1/responses", body | {"max_output_tokens": 1}).status == 200
    eventually(full.idle)
    _takes(full)


def test_the_oldest_stored_responses_go(full: Node) -> None:
    body = {"model": "small", "input": "Hello", "max_output_tokens": 1, "note": "x" * 4_000_000}
    eventually(full.idle)
    answers = [full.post("/v1/responses", body) for _ in range(36)]
    assert {a.status for a in answers} == {200}
    kept = [full.get(f"/v1/responses/{a.json['id']}").status for a in answers]
    assert kept == [404] * 3 + [200] * 33, "8 MB each, of 256 MiB"
    first, last = (a.json["id"] for a in (answers[0], answers[-1]))
    short = {"model": "small", "input": "And?", "max_output_tokens": 1}
    assert full.post("/v1/responses", short | {"previous_response_id": first}).status == 404
    assert full.post("/v1/responses", short | {"previous_response_id": last}).status == 200
    refused = full.post("/v1/responses", short | {"metadata": {"k": "v" * 513}})
    assert refused.status == 400 and "512 characters" in refused.error["message"]


def test_a_stream_of_a_response_that_is_over_ends(full: Node) -> None:
    body = {"model": "small", "input": "Hello", "background": True, "stream": True}
    answer = full.post("/v1/responses", body | {"max_output_tokens": 3})
    whole = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    over = json.loads(whole[0].removeprefix("data: "))["response"]["id"]
    assert full.get(f"/v1/responses/{over}?stream=true").text == answer.text
    for after, events in ((0, len(whole) - 1), (len(whole) - 2, 1), (len(whole) - 1, 0), (999, 0)):
        again = full.get(f"/v1/responses/{over}?stream=true&starting_after={after}")
        assert again.status == 200 and again.text.count("data: ") == events
    for after in (-1, -500):
        wrong = full.get(f"/v1/responses/{over}?stream=true&starting_after={after}")
        assert wrong.status == 400 and "starting_after" in wrong.error["message"]
    with full.stream("/v1/responses", body | {"max_output_tokens": 1800}) as events:
        cancelled = next(iter(events))["response"]["id"]
    assert full.post(f"/v1/responses/{cancelled}/cancel", {}).status == 200
    last = full.get(f"/v1/responses/{cancelled}?stream=true")
    assert last.status == 200 and "response.completed" not in last.text
    eventually(full.idle)


def test_beyond_the_limit_of_tokens(full: Node) -> None:
    """A request is admitted whole, as long as there is any room."""
    held = _open(full, COMPLETIONS, completion(prompt=[7] * TOKENS, max_tokens=1600, stream=True))
    _holds(full, 1)
    answer = full.post(COMPLETIONS, completion(max_tokens=5))
    assert answer.status == 429 and f"{TOKENS} tokens" in answer.error["message"]
    held.close()
    eventually(full.idle)
    assert full.post(COMPLETIONS, completion(max_tokens=5)).status == 200


def test_a_slot_comes_back_however_its_request_ends(full: Node) -> None:
    bodies = [
        (COMPLETIONS, completion(stream=True)),
        (COMPLETIONS, completion(n=3)),
        (CHAT, {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "stream": True}),
        ("/generate", {"prompt": "Hello", "max_tokens": 900, "stream": True}),
    ]
    for turn in range(60):  # gone at different moments: at once, while it is placed, while it runs
        path, body = bodies[turn % len(bodies)]
        connection = _open(full, path, body)
        if turn % 3 == 1:
            full.get("/livez")
        elif turn % 3 == 2 and body.get("stream"):
            connection.getresponse().read(1)
        assert connection.sock is not None
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()  # a reset
    for bad in (b"{", completion(max_tokens=-1), completion(model="large")):
        assert full.post(COMPLETIONS, bad).status in (400, 404, 429)
    _takes(full)


# ---- clients that do not read ----


@pytest.fixture(scope="module")
def swift(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[Node]:
    """A node that cuts clients off that read nothing for a second."""
    nodes = Nodes(tmp_path_factory.mktemp("swift"), etcd_member.endpoints, "swift", model)
    yield nodes.start("swift", "--send-timeout", "1").ready(60)
    nodes.close()


@pytest.fixture(scope="module")
def calm(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[Node]:
    """A node that waits for its clients."""
    nodes = Nodes(tmp_path_factory.mktemp("calm"), etcd_member.endpoints, "calm", model)
    yield nodes.start("calm", "--send-timeout", "0").ready(60)
    nodes.close()


# Its id is in every event, so that 12000 of them are far more than the kernel's buffers.
WIDE: dict[str, Any] = {"n": 24, "request_id": "wide" * 60}  # 17 MB of events in all


def _stuck(node: Node, path: str, body: dict[str, Any], headers: str = "") -> socket.socket:
    """A client with a small window that sends its request, and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((HOST, node.port))
    data = json.dumps(body | {"stream": True}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n{headers}\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def _memory(node: Node) -> int:
    """Bytes resident."""
    return int(Path(f"/proc/{node.pid}/statm").read_text().split()[1]) * 4096


def _events(raw: bytes) -> list[Any]:
    """All events in a chunked body that has its end."""
    parts, rest = [], raw.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    assert not parts[-1], "the stream has no end"
    return [json.loads(e[6:]) for e in b"".join(parts).split(b"\n\n") if e[6:7] == b"{"]


def test_a_reader_that_stops_gets_every_token_and_holds_nobody_up(calm: Node) -> None:
    whole = Run(calm, COMPLETIONS, completion()).begin().end()["choices"][0]["text"]
    before = _memory(calm)
    stuck = _stuck(calm, COMPLETIONS, completion(**WIDE))
    _holds(calm, WIDE["n"])
    others = [Run(calm, COMPLETIONS, completion(stream=True)).begin() for _ in range(20)]
    assert [run.end()["choices"][0]["text"] for run in others] == [whole] * 20
    eventually(calm.idle, within=60)
    grown = _memory(calm) - before
    events = _events(b"".join(iter(lambda: stuck.recv(65536), b"")))
    stuck.close()
    assert len(events) < 30_000, "it has not been waited for"
    texts = [""] * WIDE["n"]
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [whole] * WIDE["n"]
    assert grown < 32 * 2**20
    eventually(calm.idle)


@pytest.mark.parametrize("way", ["short", "whole application", "demo"])
def test_a_client_that_never_reads_is_cut_off(swift: Node, way: str) -> None:
    """However its stream is written: vLLM's application answers what comes from a browser."""
    path = "/generate" if way == "demo" else COMPLETIONS
    origin = "Origin: http://x\r\n" if way == "whole application" else ""
    body: dict[str, Any] = {"prompt": "Hello", "max_tokens": 1500, "n": 4}
    if path == COMPLETIONS:
        body = completion(**WIDE)
    said = len(swift.said)
    descriptors = swift.descriptors()
    stuck = _stuck(swift, path, body, origin)
    eventually(lambda: "is cut off" in swift.said[said:], within=40)
    with contextlib.suppress(ConnectionResetError):
        raw = b"".join(iter(lambda: stuck.recv(65536), b""))
        assert not raw.endswith(b"0\r\n\r\n"), "the stream ends as if it were whole"
    stuck.close()
    eventually(swift.idle)
    eventually(lambda: swift.descriptors() <= descriptors)
    assert "Traceback" not in swift.said[said:]
