"""Priorities over HTTP: by which routes they come, what they do in a queue, and when they are none.

The node's engine has room for one request, so that they end in the order of its queue.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from llumnix.server.priority import HEADER
from tests.kit.etcd import EtcdCluster
from tests.kit.node import HOST, Answer, Node, Nodes
from tests.kit.wait import eventually

pytestmark = pytest.mark.cluster

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
# Long enough for their ends to be seen in the order in which they end.
BODIES: Mapping[str, dict[str, Any]] = {
    CHAT: {"model": "small", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40},
    COMPLETIONS: {"model": "small", "prompt": "Hello", "max_tokens": 40},
    "/v1/responses": {"model": "small", "input": "Hello", "max_output_tokens": 40},
    GENERATE: {"prompt": "Hello", "max_tokens": 40},
}
EXAMPLE = Path(__file__).parents[3] / "deploy" / "classes.yaml"


@pytest.fixture(scope="module")
def node(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[Node]:
    nodes = Nodes(tmp_path_factory.mktemp("classes"), etcd_member.endpoints, "classes", model)
    options = ("--priority-classes", str(EXAMPLE), "--max-num-seqs", "1")
    yield nodes.start("classes", *options).ready(60)
    nodes.close()


def _priorities(node: Node) -> list[int]:
    return [request["priority"] for request in node.get("/llumnix/requests").json]


# In the order in which they come: route, what is added to the body, header, the priority it makes.
ASKED: list[tuple[str, dict[str, Any], str, int]] = [
    (COMPLETIONS, {}, "batch", 10),
    (CHAT, {}, "", 0),
    (COMPLETIONS, {"priority": 3, "stream": True}, "", 3),
    (CHAT, {"priority": 4}, "", 4),
    (CHAT, {"stream": True}, "batch", 10),
    ("/v1/responses", {}, "high", -1),
    (CHAT, {"priority": 5, "stream": True}, "high", -1),
    (COMPLETIONS, {"priority": 5}, "-7", -7),
    (GENERATE, {}, "normal", 0),
]


def test_the_most_urgent_goes_first_whatever_way_it_says_so(node: Node) -> None:
    ended: list[int] = []

    def ask(number: int) -> Answer:
        path, more, header, _ = ASKED[number]
        answer = node.post(path, BODIES[path] | more, headers={HEADER: header} if header else {})
        ended.append(number)
        return answer

    with ThreadPoolExecutor(len(ASKED)) as clients:
        with node.stream(COMPLETIONS, BODIES[COMPLETIONS] | {"max_tokens": 2000}) as running:
            next(iter(running))
            answers = []
            for number in range(len(ASKED)):
                answers.append(clients.submit(ask, number))
                wanted = [0, *(asked[3] for asked in ASKED[: number + 1])]
                eventually(lambda wanted=wanted: _priorities(node) == wanted, every=0.005)
            metric = 'llumnix_instance_requests{class="%s",instance="classes-0"}'
            assert [node.metrics()[metric % name] for name in ("high", "batch", "other")] == [
                2,
                2,
                3,
            ]
        assert [answer.result().status for answer in answers] == [200] * len(ASKED)
    in_turn = sorted(range(len(ASKED)), key=lambda number: ASKED[number][3])
    assert ended == in_turn
    eventually(node.idle)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("header", ["higher", "1.5", "9" * 30, "", "high, batch"])
def test_a_priority_that_is_none(node: Node, path: str, header: str) -> None:
    answer = node.post(path, BODIES[path], headers={HEADER: header})
    assert answer.status == 400
    assert answer.error["message"] == (
        f"X-Llumnix-Priority must be one of high, normal, batch or a whole number of 64 bits, "
        f"not {header!r}"
    )


def test_the_next_request_of_a_connection_has_its_own(node: Node) -> None:
    """A header says nothing of what comes behind it."""
    connection = HTTPConnection(HOST, node.port, timeout=30)
    body = json.dumps(BODIES[COMPLETIONS] | {"max_tokens": 600, "stream": True})
    found = []
    for header in ({HEADER: "high"}, {}):
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"} | header)
        response = connection.getresponse()
        response.readline()  # its first token
        found += _priorities(node)
        response.read()
    connection.close()
    assert found == [-1, 0]
