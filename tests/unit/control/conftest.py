"""Real etcd for every test: one member for the cheap ones, three for those that break things."""

from collections.abc import Callable, Iterator

import pytest

from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.session import Session
from tests.kit.etcd import EtcdCluster
from tests.kit.threads import no_thread_left
from tests.kit.wait import eventually


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
def etcd(etcd_member: EtcdCluster) -> Iterator[Etcd]:
    client = Etcd(etcd_member.endpoints)
    yield client
    client.close()


@pytest.fixture
def session(etcd: Etcd) -> Iterator[Session]:
    session = Session(etcd, ttl=3)
    session.start()
    eventually(lambda: session.remaining, within=5)
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
    with no_thread_left():
        yield
