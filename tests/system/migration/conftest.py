"""Nodes of one process over a real etcd; no actor and no thread may outlive its test."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.session import Session
from llumnix.migration import departures, destination, source
from tests.kit.etcd import EtcdCluster
from tests.kit.migrating import Control
from tests.kit.threads import no_thread_left
from tests.kit.wait import eventually


@contextmanager
def _controls(etcd: EtcdCluster, call_timeout: float) -> Iterator[dict[str, Control]]:
    controls = {}
    for name in ("a", "b", "c"):
        client = Etcd(etcd.endpoints, call_timeout=call_timeout)
        controls[name] = Control(client, Session(client, ttl=30))
    try:
        for control in controls.values():
            control.session.start()
        eventually(lambda: all(c.session.remaining for c in controls.values()), within=5)
        yield controls
    finally:
        for control in controls.values():
            control.session.stop()
            control.etcd.close()


@pytest.fixture(scope="session")
def controls(etcd_member: EtcdCluster) -> Iterator[dict[str, Control]]:
    """The ways of three nodes to an etcd that all tests share."""
    with _controls(etcd_member, call_timeout=1.5) as controls:
        yield controls


@pytest.fixture(scope="session")
def frail() -> Iterator[tuple[EtcdCluster, dict[str, Control]]]:
    """An etcd to be frozen, and the ways of three nodes to it, which are given up early."""
    with EtcdCluster(1) as etcd, _controls(etcd, call_timeout=0.6) as controls:
        yield etcd, controls


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for in vain is given up early."""
    monkeypatch.setattr(source, "GRACE", 0.1)
    monkeypatch.setattr(destination, "FIRST_OUTPUT", 0.3)
    monkeypatch.setattr(departures, "TIDY_FIRST", 0.05)
    monkeypatch.setattr(departures, "TIDY_LONGEST", 0.2)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    with no_thread_left():
        yield
