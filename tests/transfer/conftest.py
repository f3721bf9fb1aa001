"""Workers of one process meet through a real etcd."""

import itertools
from collections.abc import Iterator

import pytest

from llumnix.engine.vllm.blocks import Rendezvous
from tests.kit.etcd import EtcdCluster

_numbers = itertools.count()


@pytest.fixture(scope="session")
def member() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as cluster:
        yield cluster


@pytest.fixture
def prefix() -> str:
    """Where the workers of one test meet."""
    return f"/llumnix/transfer{next(_numbers)}/c10d/"


@pytest.fixture
def rendezvous(member: EtcdCluster, prefix: str) -> Rendezvous:
    arguments = {"endpoints": list(member.endpoints), "prefix": prefix}
    return Rendezvous("llumnix.control.c10d_store.EtcdStore", arguments, "127.0.0.1")
