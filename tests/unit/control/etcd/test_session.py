"""The lease: held, lost, unknown; and keys that come back."""

import logging
import time
from collections.abc import Callable

import pytest

from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdUnavailable
from llumnix.control.etcd.session import Session
from llumnix.control.etcd.types import KeyValue
from llumnix.control.keys import Keys
from tests.kit.etcd import EtcdCluster
from tests.kit.wait import eventually

Closing = Callable[[Callable[[], object]], None]


def _value(etcd: Etcd, key: str) -> bytes | None:
    """What the key holds; nothing as long as etcd does not answer."""
    try:
        found = etcd.get(key)
    except EtcdUnavailable:
        return None
    return found.value if found else None


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What sessions have said of their leases, one word for each time: held, lost or unknown."""
    said = (text.removeprefix("The lease is ") for text in caplog.messages if "The lease" in text)
    return [text.partition(":")[0] for text in said]


def test_put_latest_and_remove(etcd: Etcd, session: Session, keys: Keys) -> None:
    key = keys.node("a")
    for i in range(10):
        session.put(key, str(i).encode())
    eventually(lambda: _value(etcd, key) == b"9")
    found = etcd.get(key)
    assert found is not None and found.lease == session.lease
    session.remove(key)
    eventually(lambda: etcd.get(key) is None)
    session.put(key, b"9")
    eventually(lambda: _value(etcd, key) == b"9")


def test_remove_leaves_a_successors_key(etcd: Etcd, session: Session, keys: Keys) -> None:
    key = keys.node("a")
    session.put(key, b"1")
    eventually(lambda: _value(etcd, key) == b"1")
    etcd.put(key, b"successor")
    session.remove(key)
    session.put(keys.node("b"), b"2")
    eventually(lambda: _value(etcd, keys.node("b")) == b"2")
    assert _value(etcd, key) == b"successor"


def test_stop_takes_the_keys_along(etcd: Etcd, keys: Keys) -> None:
    session = Session(etcd)
    session.start()
    session.put(keys.node("a"), b"1")
    eventually(lambda: etcd.get(keys.node("a")))
    session.stop()
    assert etcd.get(keys.node("a")) is None
    assert session.remaining == 0 and session.lease == 0


def test_registers_again_after_the_lease_was_revoked(
    etcd: Etcd, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    session = Session(etcd, ttl=3)
    session.start()
    session.put(keys.node("a"), b"1")
    eventually(lambda: etcd.get(keys.node("a")))
    first = session.lease
    etcd.lease_revoke(first)
    eventually(lambda: _value(etcd, keys.node("a")) == b"1" and session.lease != first)
    assert _told(caplog) == ["held", "lost", "held"]
    session.stop()


def test_registers_again_after_the_data_was_wiped(keys: Keys, closing: Closing) -> None:
    with EtcdCluster(1) as cluster:
        etcd = Etcd(cluster.endpoints)
        session = Session(etcd)
        session.start()
        session.put(keys.node("a"), b"1")
        eventually(lambda: etcd.get(keys.node("a")))
        cluster.restart(0, wipe=True)
        cluster.wait_ready()
        eventually(lambda: _value(etcd, keys.node("a")) == b"1")
        session.stop()
        etcd.close()


def test_unknown_is_not_lost(
    three: EtcdCluster, keys: Keys, closing: Closing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    etcd = Etcd(three.endpoints, call_timeout=0.5)
    session = Session(etcd, ttl=10)
    session.start()
    closing(etcd.close)
    closing(session.stop)
    session.put(keys.node("a"), b"1")
    eventually(lambda: etcd.get(keys.node("a")))
    lease = session.lease
    for i in range(3):
        three.freeze(i)
    eventually(lambda: _told(caplog) == ["held", "unknown"])
    assert session.remaining > 0, "what was granted is held until it runs out"
    for i in range(3):
        three.thaw(i)
    eventually(lambda: _told(caplog)[-1] == "held")
    assert session.lease == lease and "lost" not in _told(caplog)
    found = etcd.get(keys.node("a"))
    assert found is not None and found.lease == lease


def test_etcd_absent_at_the_start(keys: Keys, closing: Closing) -> None:
    with EtcdCluster(1) as cluster:
        cluster.kill(0)
        etcd = Etcd(cluster.endpoints)
        session = Session(etcd)
        session.start()
        session.put(keys.node("a"), b"1")
        time.sleep(0.3)  # in which it asks in vain
        assert session.lease == 0 and session.remaining == 0
        cluster.restart(0)
        cluster.wait_ready()
        eventually(lambda: _value(etcd, keys.node("a")) == b"1")
        session.stop()
        etcd.close()


def test_observe_repairs_only_what_others_changed(etcd: Etcd, session: Session, keys: Keys) -> None:
    key = keys.node("a")
    session.put(key, b"1")
    eventually(lambda: _value(etcd, key) == b"1")
    written = etcd.get(key)
    assert written is not None
    eventually(lambda: session._owned._written)
    session.observe({}, written.mod_revision - 1)  # from before the write
    session.observe({key: written}, written.mod_revision + 10)
    again = etcd.get(key)
    assert again == written, "nothing was wrong, so nothing was to be written"
    late = etcd.put(key, b"0")
    session.observe({key: KeyValue(key, b"0", written.create_revision, late)}, late)
    eventually(lambda: _value(etcd, key) == b"1", within=10)
    found = etcd.get(key)
    assert found is not None and found.lease == session.lease
