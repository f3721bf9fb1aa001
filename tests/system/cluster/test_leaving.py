"""Clients that leave: what they have asked for ends, whatever way and moment they choose."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.leaving import SMALL, WAYS, Client, post
from tests.kit.node import Node, Nodes
from tests.kit.wait import eventually

CROWD, TURNS = 100, 3
TEXTS = 200
PROMPT: dict[str, Any] = {"model": "small", "prompt": "Hello", "max_tokens": 2000}
CHAT = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000}
DEMO = {"prompt": "Hello", "max_tokens": 2000}
# vLLM's middleware has to answer those with an Origin, so they take the way of all other routes.
ORIGIN = {"Origin": "http://elsewhere"}
ROUTES: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("/v1/completions", PROMPT, {}),
    ("/v1/completions", PROMPT | {"n": 2}, ORIGIN),
    ("/v1/chat/completions", CHAT, {}),
    ("/v1/chat/completions", CHAT, ORIGIN),
    ("/invocations", PROMPT, {}),
    ("/generate", DEMO, {}),
    ("/v1/responses", {"model": "small", "input": "Hi", "max_output_tokens": 2000}, {}),
    ("/v1/messages", CHAT, {}),
]


def requests() -> Iterator[bytes]:
    """Requests that run for seconds: of all routes, streamed and whole."""
    for stream, (path, body, headers) in itertools.cycle(itertools.product((True, False), ROUTES)):
        yield post(path, body | {"ignore_eos": True, "stream": stream}, headers)


@contextlib.contextmanager
def crowd(node: Node, size: int) -> Iterator[list[Client]]:
    """Clients that have asked, and read nothing."""
    clients: list[Client] = []
    try:
        for request in itertools.islice(requests(), size):
            clients.append(Client(node.port, SMALL).send(request))
        yield clients
    finally:
        for client in clients:
            client.close()


@pytest.mark.cluster
@pytest.mark.parametrize("moment", ("before", "running", "mixed"))
def test_a_crowd_leaves_nothing(one: Node, moment: str) -> None:
    descriptors = one.descriptors()
    for turn in range(TURNS):
        with crowd(one, CROWD) as clients:
            if moment == "running":
                eventually(lambda: one.metric("llumnix_open_requests") >= CROWD)
            elif moment == "mixed":
                time.sleep(0.1 * turn)  # some wait for an instance, some in its queue
            for number, client in enumerate(clients):
                client.leave(WAYS[number % len(WAYS)])
            took = eventually(one.idle, within=3)  # they would run for ten seconds
            eventually(lambda: one.descriptors() <= descriptors + 2)
        print(f"{moment}: {took:.2f} s")


@pytest.fixture(scope="module")
def behind(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[Node]:
    """A node with an operator's middleware between clients and vLLM's handlers."""
    nodes = Nodes(tmp_path_factory.mktemp("behind"), etcd_member.endpoints, "behind", model)
    yield nodes.start("behind", "--middleware", "tests.kit.middleware.plain").ready(60)
    nodes.close()


@pytest.mark.cluster
def test_a_crowd_behind_a_middleware_leaves_nothing(behind: Node) -> None:
    """It closes no generator of tokens, and the garbage collector comes when it wants to."""
    for _ in range(TURNS):
        with crowd(behind, CROWD) as clients:
            eventually(lambda: behind.metric("llumnix_open_requests") >= CROWD)
            for number, client in enumerate(clients):
                client.leave(WAYS[number % len(WAYS)])
            eventually(behind.idle, within=3)


TEXT = "".join(f"{n:x} " for n in range(30_000))
TOKENISED: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"prompt": TEXT[:90_000]}),
    ("/tokenize", {"messages": [{"role": "user", "content": TEXT[:90_000]}]}),
    ("/v1/completions", {"prompt": [TEXT[n : n + 8000] for n in range(0, 80_000, 8000)]}),
]


@pytest.mark.cluster
@pytest.mark.parametrize(("path", "body"), TOKENISED)
def test_texts_of_clients_that_have_left_are_not_tokenised(
    one: Node, path: str, body: dict[str, Any]
) -> None:
    """There is one tokenizer, for which others would wait half a minute."""

    def asked(data: bytes) -> float:
        client, began = Client(one.port).send(data), time.perf_counter()
        assert client.read()
        client.close()
        return time.perf_counter() - began

    small = post("/tokenize", {"model": "small", "prompt": "Hi"})
    long = post(path, {"model": "small"} | body)
    each = max(asked(long), 0.02)
    clients = [Client(one.port).send(long) for _ in range(TEXTS)]
    for number, client in enumerate(clients):
        client.leave(WAYS[number % len(WAYS)])
    took = asked(small)
    print(f"{path}: {each:.2f} s each, {took:.2f} s for one behind {TEXTS}")
    assert took < each * TEXTS / 2
    for client in clients:
        client.close()


@pytest.mark.cluster
def test_a_client_without_room_that_closes_its_side(one: Node) -> None:
    """Its connection ends, though the kernel of the client says for ever that it has no room."""
    with crowd(one, 1) as (client,):
        eventually(lambda: one.metric("llumnix_instance_running") == 1)
        client.leave("half")
        eventually(one.idle, within=3)
        client.socket.settimeout(5)
        client.rest()


@pytest.mark.cluster
@pytest.mark.parametrize("path", ("/v1/completions", "/generate"))
def test_an_old_client_hears_the_end_of_a_stream(one: Node, path: str) -> None:
    """HTTP/1.0 knows no other end of an answer without a length."""
    body = {"prompt": "Hello", "max_tokens": 5, "stream": True}
    body |= {"model": "small"} if path.startswith("/v1") else {}
    old = post(path, body, {"Connection": "keep-alive"}).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    client = Client(one.port).send(old)
    client.socket.settimeout(5)
    answer = client.rest()
    client.close()
    assert b" 200 OK" in answer and b"keep-alive" not in answer.partition(b"\r\n\r\n")[0].lower()
    assert answer.endswith(b"data: [DONE]\n\n" if path.startswith("/v1") else b"\n")
