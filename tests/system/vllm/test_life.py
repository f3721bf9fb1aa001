"""Real instances come, die and go while requests are served."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.moves import Run, differences
from tests.kit.node import Node, Nodes, descendants
from tests.kit.wait import eventually
from tests.system.cluster.test_life import Reader
from tests.system.vllm.conftest import ENVIRONMENT, OPTIONS, START

pytestmark = pytest.mark.vllm

COMPLETIONS = "/v1/completions"


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": "1, 2, 3,", "max_tokens": 10, "temperature": 0} | more


def test_a_third_instance_comes_and_two_go(node: Node, etcd_member: EtcdCluster) -> None:
    key = "/llumnix/vllm/desired/a"
    etcd_member.ctl("put", key, "3")
    took = eventually(lambda: len(node.instances()) == 3, within=START, every=0.1)
    assert took < max(40.0, node.took), "it is forked, not started from nothing"
    long = completion(max_tokens=150, ignore_eos=True)
    readers = [Reader(node, body=long | {"prompt": f"{n}, "}).begin() for n in range(3)]
    etcd_member.ctl("put", key, "1")
    for reader in readers:
        reader.join(300.0)
        assert reader.done and not reader.refused
        assert reader.lines[-2] == b"data: [DONE]\n"
    eventually(lambda: len(node.status["instances"]) == 1, within=60, every=0.1)
    assert node.post(COMPLETIONS, completion()).status == 200
    etcd_member.ctl("put", key, "2")
    eventually(lambda: len(node.instances()) == 2, within=START, every=0.1)
    etcd_member.ctl("del", key)


def _engines(node: Node) -> list[int]:
    """The EngineCore processes of a node."""
    found = []
    for pid in sorted(descendants(node.pid)):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "EngineCore" in title or "engine_core" in title.lower():
            found.append(pid)
    return found


def _blocks(node: Node) -> set[int]:
    """How many KV blocks the instances have, each."""
    return {one["total_blocks"] for one in node.status["instances"]}


def test_a_killed_engine(node: Node) -> None:
    """New requests are served by the other; the instance comes back; the log says why."""
    engines = _engines(node)
    assert len(engines) == 2
    before, blocks = len(node.said), _blocks(node)
    os.kill(engines[0], signal.SIGKILL)
    for n in range(4):
        assert node.post(COMPLETIONS, completion(prompt=f"{n}, ")).status == 200
    eventually(
        lambda: " ERROR instance a-" in node.said[before:]
    )  # requests may have gone on before
    line = next(line for line in node.said[before:].splitlines() if " ERROR instance a-" in line)
    assert "SIGKILL" in line and "next start in 1 s" in line
    eventually(lambda: len(node.instances()) == 1)
    eventually(lambda: len(node.instances()) == 2, within=START, every=0.1)
    assert node.get("/livez").status == 200
    assert _blocks(node) == blocks and len(blocks) == 1, "what it had before is not counted twice"


def test_nothing_is_compiled_while_an_eager_engine_serves(node: Node, compiled: Path) -> None:
    """An engine stands for many seconds while a compiler runs, and dies if it can't."""
    for body in completion(logprobs=2), completion(logprobs=1, echo=True, temperature=1.0):
        assert node.post(COMPLETIONS, body).status == 200
    assert not any(compiled.iterdir())


def test_a_killed_engine_with_requests(node: Node) -> None:
    """All go on, those of the killed engine at the other one; the answers are the right ones."""
    bodies = [
        completion(max_tokens=120, ignore_eos=True, prompt=f"{n}, ", return_token_ids=True)
        for n in range(4)
    ]
    right = [Run(node, COMPLETIONS, body).begin() for body in bodies]
    expected = [run.end() for run in right]
    # Dispatch goes by reports, which tell a moment later that these have ended.
    eventually(lambda: not any(one["load"]["running"] for one in node.status["instances"]))
    runs = [Run(node, COMPLETIONS, body).begin() for body in bodies]
    where = {request["instance"] for run in runs for request in run.reach(5)}
    assert where == {"a-0", "a-1"}
    os.kill(_engines(node)[0], signal.SIGKILL)
    for run, answer in zip(runs, expected, strict=True):
        assert not differences(answer, run.end())


def test_a_second_node_without_instances(real: Nodes, node: Node) -> None:
    options = (*OPTIONS, "--initial-instances", "0")
    other = real.start("b", *options, engine="vllm", environment=ENVIRONMENT).ready(START)
    bodies = [
        completion(max_tokens=40),
        completion(logprobs=3),
        completion(echo=True, logprobs=1, max_tokens=2),
        completion(n=2, temperature=1.0, seed=3),
    ]
    for body in bodies:
        near, far = (n.post(COMPLETIONS, body) for n in (other, node))
        assert near.status == far.status == 200, near.text
        assert _rounded(near.json["choices"]) == _rounded(far.json["choices"])
    with other.stream(COMPLETIONS, completion(max_tokens=40)) as stream:
        assert stream.text() == node.post(COMPLETIONS, bodies[0]).json["choices"][0]["text"]
    with other.stream(COMPLETIONS, completion(max_tokens=1900, ignore_eos=True)) as stream:
        next(iter(stream))
        assert not node.idle()
    eventually(node.idle, within=10)  # uncancelled it would run for a minute
    assert other.stop(60) == 0
    eventually(lambda: len(node.status["nodes"]) == 1)


def _rounded(value: Any) -> Any:
    """The last digits of logprobs depend on what else is in the batch."""
    if isinstance(value, float):
        return round(value, 2)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def test_an_instance_that_cannot_start(
    tmp_path: Path, etcd_member: EtcdCluster, model: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    nodes = Nodes(tmp_path, etcd_member.endpoints, "broken", str(broken))
    try:
        node = nodes.start("c", *OPTIONS, engine="vllm", environment=ENVIRONMENT).up(START)
        eventually(lambda: "did not start" in node.said, within=START)
        line = next(line for line in node.said.splitlines() if "did not start" in line)
        assert "instance c-0 did not start: " in line and "weights" in line.lower(), line
        assert "next start in" in line
        assert node.get("/livez").status == 200 and node.get("/readyz").status == 503
        assert node.post(COMPLETIONS, completion()).status == 503
        assert node.stop(60) == 0
    finally:
        nodes.close()
