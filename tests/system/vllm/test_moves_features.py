"""Requests of which the engine sees many small ones."""

import time

import pytest

from tests.kit.moves import Run, differences
from tests.kit.node import Node
from tests.system.vllm.moved_cases import COMPLETIONS

pytestmark = pytest.mark.vllm


def test_beam_search(node: Node) -> None:
    """Moves are asked for all the time; most of its requests, of one token, end before they can."""
    body = {"prompt": "A king had", "use_beam_search": True, "n": 3, "max_tokens": 12}
    twin = Run(node, COMPLETIONS, body).begin().end()
    run = Run(node, COMPLETIONS, body).begin()
    asked = 0
    while run.is_alive():
        for request in node.get("/llumnix/requests").json:
            other = "a-1" if request["instance"] == "a-0" else "a-0"
            told = node.post("/llumnix/migrate", {"request": request["id"], "to": other})
            assert told.status in (200, 404, 409), told.text
            asked += 1
        time.sleep(0.01)
    assert not differences(twin, run.end())
    assert asked >= 3
