"""Engines that die or hang while a request of real vLLM moves: no token is lost or changed."""

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.moves import Run, differences, engine_of
from tests.kit.node import Answer, Node
from tests.kit.tails import story
from tests.kit.wait import eventually
from tests.system.vllm.conftest import MIGRATION_TIMEOUT

pytestmark = pytest.mark.vllm

COMPLETIONS = "/v1/completions"
# Long enough to be copied in several blocks, and with outputs that hang on those before.
BODY: dict[str, Any] = {
    "prompt": story(random.Random(8), 250),
    "max_tokens": 48,
    "temperature": 0.8,
    "seed": 4,
    "frequency_penalty": 0.3,
    "logprobs": 1,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def right(whole: Node) -> dict[str, Any]:
    """What the client gets if nothing happens."""
    return Run(whole, COMPLETIONS, BODY).begin().end()


class Move:
    """A move to an instance whose worker is frozen: blocks are being copied until it goes on."""

    def __init__(self, node: Node, member: EtcdCluster, run: Run) -> None:
        (request,) = run.reach(3)
        self.source = request["instance"]
        (self.destination,) = (i for i in node.instances() if i != self.source)
        self._worker = engine_of(node, self.destination, "Worker")
        self._pool = ThreadPoolExecutor(1)
        os.kill(self._worker, signal.SIGSTOP)
        body = {"request": request["id"], "to": self.destination}
        self.answer: Future[Answer] = self._pool.submit(
            node.post, "/llumnix/migrate", body, within=60.0
        )
        records = "/llumnix/vllm/migrations/"
        eventually(
            lambda: self.answer.done() or "copying" in member.ctl("get", "--prefix", records),
            within=60.0,
        )
        assert not self.answer.done(), self.answer.result().text

    def go_on(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._worker, signal.SIGCONT)


@pytest.fixture
def moving(node: Node, etcd_member: EtcdCluster, right: Any) -> Iterator[tuple[Run, Move]]:
    """A request whose blocks are being copied; afterwards nothing of it may be left."""
    run = Run(node, COMPLETIONS, BODY).begin()
    move = Move(node, etcd_member, run)
    try:
        yield run, move
    finally:
        move.go_on()
    _nothing_is_left(node, etcd_member)


def _nothing_is_left(node: Node, member: EtcdCluster) -> None:
    """No request, no record; and two small requests have all other KV blocks to themselves."""
    eventually(lambda: len(node.instances()) == 2 and node.idle(), within=90.0, every=0.1)
    assert node.get("/llumnix/requests").json == []
    eventually(lambda: not member.ctl("get", "--prefix", "/llumnix/vllm/migrations/").strip())
    small = {"prompt": "1, 2, 3,", "max_tokens": 50, "ignore_eos": True}
    runs = [Run(node, COMPLETIONS, small).begin() for _ in range(2)]
    for run in runs:
        run.reach(10)  # what was told before may be of a step that had the other request still
    used = {k: v for k, v in node.metrics().items() if "used_blocks" in k or "cache_usage" in k}
    held = sum(v for k, v in used.items() if k.startswith("llumnix_instance_used_blocks{"))
    assert 2 <= held <= 4, used
    for run in runs:
        run.end()


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_an_engine_is_killed_while_blocks_are_copied(
    node: Node, moving: tuple[Run, Move], right: dict[str, Any], victim: str
) -> None:
    run, move = moving
    os.kill(engine_of(node, getattr(move, victim)), signal.SIGKILL)
    assert move.answer.result(60.0).status != 200
    move.go_on()
    assert not differences(right, run.end())


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_an_engine_is_killed_right_after_the_commit(
    node: Node, etcd_member: EtcdCluster, right: dict[str, Any], victim: str
) -> None:
    run = Run(node, COMPLETIONS, BODY).begin()
    (answer,) = run.move(3)
    os.kill(engine_of(node, answer[victim]), signal.SIGKILL)
    assert not differences(right, run.end())
    _nothing_is_left(node, etcd_member)


def test_a_request_is_cancelled_while_its_blocks_are_copied(
    node: Node, moving: tuple[Run, Move]
) -> None:
    run, move = moving
    run.hang_up()
    eventually(lambda: not run.requests())
    move.go_on()
    answer = move.answer.result(60.0)
    assert answer.status != 200 and "ended" in answer.text, answer.text


def test_a_transfer_hangs(node: Node, moving: tuple[Run, Move], right: dict[str, Any]) -> None:
    """The request goes on where it is; the next can move once the engine is itself again."""
    run, move = moving
    answer = move.answer.result(4 * MIGRATION_TIMEOUT + 30)
    assert answer.status != 200, answer.text
    move.go_on()
    other = Run(node, COMPLETIONS, BODY).begin()
    other.move(3)
    assert not differences(right, run.end())
    assert not differences(right, other.end())
