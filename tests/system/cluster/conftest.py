"""Node processes with modelled engines over one real etcd."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.etcd import EtcdCluster
from tests.kit.node import Node, Nodes


@pytest.fixture
def nodes(
    tmp_path: Path, etcd_member: EtcdCluster, cluster_name: str, model: str
) -> Iterator[Nodes]:
    """Starts nodes of a cluster of their own."""
    nodes = Nodes(tmp_path, etcd_member.endpoints, cluster_name, model)
    yield nodes
    nodes.close()


@pytest.fixture(scope="session")
def one(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[Node]:
    """A node that tests share: they leave it as they found it."""
    nodes = Nodes(tmp_path_factory.mktemp("one"), etcd_member.endpoints, "one", model)
    options = ("--max-body-bytes", "100000", "--allowed-origins", '["http://elsewhere"]')
    yield nodes.start("one", "--initial-instances", "2", *options).ready(60)
    nodes.close()


@pytest.fixture(scope="session")
def two(
    tmp_path_factory: pytest.TempPathFactory, etcd_member: EtcdCluster, model: str
) -> Iterator[tuple[Node, Node]]:
    """A node without instances, and one with one; tests share them."""
    nodes = Nodes(tmp_path_factory.mktemp("two"), etcd_member.endpoints, "two", model)
    near = nodes.start("near", "--initial-instances", "0")
    far = nodes.start("far")
    yield near.ready(60), far.ready(60)
    nodes.close()
