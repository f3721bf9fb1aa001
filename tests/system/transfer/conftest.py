"""Workers of one process meet through a real etcd."""

import itertools
from collections.abc import Iterator

import pytest

from llumnix.engine.vllm.kv_blocks import Rendezvous
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


@pytest.fixture(params=["memory", "group"])
def rendezvous(request: pytest.FixtureRequest, member: EtcdCluster, prefix: str) -> Rendezvous:
    """Once for each way that blocks can take without a GPU."""
    arguments = {"endpoints": list(member.endpoints), "prefix": prefix}
    store = "llumnix.control.c10d_store.EtcdStore"
    return Rendezvous(store, arguments, "127.0.0.1", (request.param,))
