"""Workers of one process meet through a real etcd."""

import pytest

from llumnix.control.keys import Keys
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from tests.kit.etcd import EtcdCluster


@pytest.fixture
def prefix(keys: Keys) -> str:
    """Where the workers of one test meet."""
    return f"{keys.prefix}c10d/"


@pytest.fixture(params=["memory", "group"])
def rendezvous(request: pytest.FixtureRequest, etcd_member: EtcdCluster, prefix: str) -> Rendezvous:
    """Once for each way that blocks can take without a GPU."""
    arguments = {"endpoints": list(etcd_member.endpoints), "prefix": prefix}
    store = "llumnix.control.c10d_store.EtcdStore"
    return Rendezvous(store, arguments, "127.0.0.1", (request.param,))
