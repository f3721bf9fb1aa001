"""Real etcd for every test: one member for the cheap ones, three for those that break things."""

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.session import Session
from llumnix.control.keys import Keys
from tests.kit.etcd import EtcdCluster
from tests.kit.wait import eventually

_numbers = itertools.count()


@pytest.fixture(scope="session")
def single() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _three() -> Iterator[EtcdCluster]:
    with EtcdCluster(3) as cluster:
        yield cluster


@pytest.fixture
def three(_three: EtcdCluster) -> Iterator[EtcdCluster]:
    """Three members, all well before and after."""
    yield _three
    _three.heal()


@pytest.fixture
def etcd(single: EtcdCluster) -> Iterator[Etcd]:
    client = Etcd(single.endpoints)
    yield client
    client.close()


@pytest.fixture
def keys() -> Keys:
    """A cluster of its own for each test, as they share one etcd."""
    return Keys(f"test{next(_numbers)}")


@pytest.fixture
def session(etcd: Etcd) -> Iterator[Session]:
    session = Session(etcd, ttl=3)
    session.start()
    assert session.wait_held(5)
    yield session
    session.stop()


@pytest.fixture
def closing() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Takes what is to be called when the test is over, the latest first."""
    calls: list[Callable[[], object]] = []
    yield calls.append
    for call in reversed(calls):
        call()


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    # gRPC's own threads end a moment after their channel.
    eventually(lambda: not (set(threading.enumerate()) - before), within=15)
