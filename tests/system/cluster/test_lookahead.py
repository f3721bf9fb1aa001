"""The look-ahead on a real node: who waits behind a blocked request goes where it fits at once."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.node import Node, Nodes
from tests.kit.wait import eventually

pytestmark = pytest.mark.cluster

COMPLETIONS = "/v1/completions"
# Two engines with 130 KV blocks of 16 tokens; requests go to them in turn.
# Their steps are slow, so that the long requests still run when all has been looked at.
OPTIONS = ("--initial-instances", "2", "--dispatch-policy", "rr", "--migration-interval", "0.1")
MEMORY = ("--num-gpu-blocks-override", "130", "--block-size", "16", "--sim-profile", "cpu-steady")


@pytest.fixture
def node(tmp_path: Any, etcd_member: EtcdCluster, model: str) -> Iterator[Node]:
    nodes = Nodes(tmp_path, etcd_member.endpoints, "lookahead", model)
    node = nodes.start("look", *OPTIONS, *MEMORY, "--migration-policy", "lookahead").ready(60)
    eventually(lambda: node.instances() == ["look-0", "look-1"])
    yield node
    nodes.close()


def asks(prompt: int, output: int) -> dict[str, Any]:
    """A request of so many tokens."""
    return {"prompt": [100] * prompt, "max_tokens": output, "stream": True, "ignore_eos": True}


def where(node: Node) -> list[tuple[str, str, int]]:
    """Instance, state and length of each prompt, in the order of their lengths."""
    listed = node.get("/llumnix/requests").json
    found = [(r["instance"], r["state"], r["tokens"] - r["generated"]) for r in listed]
    return sorted(found, key=lambda request: request[2])


def test_a_short_request_does_not_wait_behind_a_long_one(node: Node) -> None:
    with (
        node.stream(COMPLETIONS, asks(1400, 200)) as full,
        node.stream(COMPLETIONS, asks(1000, 400)) as other,
    ):
        next(iter(full)), next(iter(other))
        homes = {tokens: instance for instance, _, tokens in where(node)}
        with node.stream(COMPLETIONS, asks(1200, 4)) as blocked:  # beside neither of the two
            eventually(lambda: (homes[1400], "waiting", 1200) in where(node))
            assert node.post(COMPLETIONS, asks(20, 4) | {"stream": False}).status == 200
            short = node.post(COMPLETIONS, asks(10, 4) | {"stream": False})
            assert short.status == 200
            assert {(homes[1400], "waiting", 1200), (homes[1400], "running", 1400)} <= set(
                where(node)
            ), "it has overtaken the one that is blocked"
            assert f"moves a request from {homes[1400]} " in node.log.read_text()
            assert len(list(blocked)) > 1
    eventually(node.idle)
