"""One real node with two vLLM instances for all tests here; they leave it as they found it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.kit import aloud
from tests.kit.etcd import EtcdCluster
from tests.kit.node import Node, Nodes
from tests.kit.wait import eventually

REASONING = {"reasoning_start_str": aloud.START, "reasoning_end_str": aloud.END}
MIGRATION_TIMEOUT = 5.0  # seconds
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")
OPTIONS += ("--block-size", "32", "--max-instances", "3")
# Some of the moves hand over at once, others wait until a block is full.
OPTIONS += ("--migration-max-requests", "32", "--migration-tail-tokens", "20")
# Blocks go as they do between GPUs of one machine; tests/system/transfer has the other ways.
OPTIONS += ("--migration-carrier", "memory")
OPTIONS += ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
OPTIONS += ("--reasoning-parser", "aloud", "--reasoning-parser-plugin", aloud.__file__)
OPTIONS += ("--reasoning-config", json.dumps(REASONING))
OPTIONS += ("--migration-timeout", str(MIGRATION_TIMEOUT))
# Some tests stop a worker to see what waits for it, and not for the engine to be taken for dead.
OPTIONS += ("--hang-timeout", "60")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
START = 600.0  # seconds that a first instance may take on a small machine


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where PyTorch would put what it compiles while the node below serves."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def real(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[Nodes]:
    """Starts nodes with real engines, in one cluster."""
    nodes = Nodes(tmp_path_factory.mktemp("vllm"), etcd_member.endpoints, "vllm", model)
    yield nodes
    nodes.close()


@pytest.fixture(scope="session")
def whole(real: Nodes, compiled: Path) -> Node:
    """The node with two instances."""
    options = (*OPTIONS, "--initial-instances", "2")
    environment = ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    node = real.start("a", *options, engine="vllm", environment=environment)
    node.ready(START)
    eventually(lambda: node.instances() == ["a-0", "a-1"], within=START, every=0.2)
    return node


@pytest.fixture
def node(whole: Node) -> Iterator[Node]:
    """The same, with both instances up and idle before and after each test."""
    eventually(lambda: node_is_whole(whole), within=START, every=0.1)
    yield whole
    eventually(lambda: node_is_whole(whole), within=START, every=0.1)


def node_is_whole(node: Node) -> bool:
    return node.instances() == ["a-0", "a-1"] and node.idle()


@pytest.fixture
def client(node: Node) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
