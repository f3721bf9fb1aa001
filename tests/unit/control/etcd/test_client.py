"""The client: calls, transactions, leases, and going on when a member doesn't answer."""

import time

import pytest

from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import (
    EtcdOutcomeUnknown,
    EtcdRefused,
    EtcdUnavailable,
    LeaseNotFound,
)
from llumnix.control.etcd.types import Compare, Delete, Get, Put
from llumnix.control.keys import Keys
from tests.kit.etcd import EtcdCluster, free_ports
from tests.kit.wait import eventually


def test_put_get_delete(etcd: Etcd, keys: Keys) -> None:
    revision = etcd.put(keys.node("a"), b"1")
    found = etcd.get(keys.node("a"))
    assert found is not None
    assert (found.key, found.value, found.mod_revision) == (keys.node("a"), b"1", revision)
    assert etcd.delete(keys.node("a"))
    assert not etcd.delete(keys.node("a"))
    assert etcd.get(keys.node("a")) is None


def test_prefix_holds_only_its_own(etcd: Etcd, keys: Keys) -> None:
    for name in ("a", "b"):
        etcd.put(keys.node(name), b"1")
    etcd.put(keys.prefix[:-1] + "x/nodes/c", b"1")
    listed, revision = etcd.get_prefix(keys.prefix)
    assert [kv.key for kv in listed] == [keys.node("a"), keys.node("b")]
    assert revision >= max(kv.mod_revision for kv in listed)


def test_operator_reads_with_etcdctl(etcd_member: EtcdCluster, etcd: Etcd, keys: Keys) -> None:
    etcd.put(keys.leader, b'{"node":"a"}')
    assert etcd_member.ctl("get", keys.leader, "--print-value-only") == '{"node":"a"}'


def test_transaction(etcd: Etcd, keys: Keys) -> None:
    a, b = keys.node("a"), keys.node("b")
    first = etcd.put(a, b"1")
    done = etcd.txn(
        [Compare(a, "mod", first), Compare(b, "create", 0)], [Put(b, b"2"), Get(a), Delete(a)]
    )
    assert done.succeeded and done.found[1] is not None and done.found[1].value == b"1"
    again = etcd.txn([Compare(a, "mod", first)], [Put(b, b"3")], [Get(b)])
    assert not again.succeeded and again.found[0] is not None and again.found[0].value == b"2"


def test_put_if_absent_and_swap(etcd: Etcd, keys: Keys) -> None:
    ours, made = etcd.put_if_absent(keys.leader, b"a")
    assert ours and made.value == b"a"
    ours, found = etcd.put_if_absent(keys.leader, b"b")
    assert not ours and found == made
    ours, swapped = etcd.compare_and_swap(keys.leader, b"c", made.mod_revision)
    assert ours and swapped is not None and swapped.value == b"c"
    assert etcd.compare_and_swap(keys.leader, b"d", made.mod_revision) == (False, swapped)
    etcd.delete(keys.leader)
    assert etcd.compare_and_swap(keys.leader, b"d", swapped.mod_revision) == (False, None)


def test_lease(etcd: Etcd, keys: Keys) -> None:
    lease, ttl = etcd.lease_grant(5)
    assert ttl == 5
    etcd.put(keys.node("a"), b"1", lease)
    assert etcd.lease_keepalive_once(lease) == 5
    etcd.lease_revoke(lease)
    etcd.lease_revoke(lease)
    assert etcd.get(keys.node("a")) is None
    assert etcd.lease_keepalive_once(lease) == 0
    with pytest.raises(LeaseNotFound):
        etcd.put(keys.node("a"), b"1", lease)


def test_refused_is_not_unavailable(etcd: Etcd) -> None:
    with pytest.raises(EtcdRefused, match="key is not provided"):
        etcd.put("", b"1")


def test_no_endpoint_answers() -> None:
    ports = free_ports(2)
    etcd = Etcd([f"http://127.0.0.1:{port}" for port in ports])
    began = time.monotonic()
    with pytest.raises(EtcdUnavailable, match="connection refused") as caught:
        etcd.put("/a", b"1")
    assert not isinstance(caught.value, EtcdOutcomeUnknown)
    assert all(str(port) in str(caught.value) for port in ports)
    assert time.monotonic() - began < 1.4
    etcd.close()


def test_dead_endpoint_first(etcd_member: EtcdCluster, keys: Keys) -> None:
    etcd = Etcd([f"127.0.0.1:{free_ports(1)[0]}", *etcd_member.endpoints])
    etcd.put(keys.node("a"), b"1")
    etcd.close()


def test_frozen_alone_leaves_the_outcome_open(keys: Keys) -> None:
    with EtcdCluster(1) as cluster:
        etcd = Etcd(cluster.endpoints, call_timeout=0.5)
        etcd.put(keys.node("a"), b"1")
        cluster.freeze(0)
        with pytest.raises(EtcdOutcomeUnknown):
            etcd.put(keys.node("a"), b"2")
        with pytest.raises(EtcdUnavailable) as caught:
            etcd.get(keys.node("a"))
        assert not isinstance(caught.value, EtcdOutcomeUnknown)
        cluster.thaw(0)
        eventually(lambda: _there(etcd, keys.node("a")))
        etcd.close()


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_failover(three: EtcdCluster, keys: Keys, fault: str) -> None:
    etcd = Etcd(three.endpoints)
    etcd.put(keys.node("a"), b"1")
    getattr(three, fault)(0)
    began = time.monotonic()
    eventually(lambda: _created(etcd, keys.leader))
    assert time.monotonic() - began < 10
    began = time.monotonic()
    etcd.put(keys.node("a"), b"2")
    assert time.monotonic() - began < 1.4, "calls should go to a healthy member from now on"
    etcd.close()


def _there(etcd: Etcd, key: str) -> bool:
    try:
        return etcd.get(key) is not None
    except EtcdUnavailable:
        return False


def _created(etcd: Etcd, key: str) -> bool:
    """Of all tries exactly one creates the key, and it is told so, whichever member froze."""
    try:
        return etcd.put_if_absent(key, b"mine")[0]
    except EtcdUnavailable:
        return False


def test_authentication(keys: Keys) -> None:
    with EtcdCluster(1, "secret") as cluster:
        etcd = Etcd(cluster.endpoints, user="root", password="secret")
        etcd.put(keys.node("a"), b"1")
        etcd._token = "expired.1"
        etcd.put(keys.node("a"), b"2")
        etcd.close()
        for wrong in (Etcd(cluster.endpoints, user="root", password="x"), Etcd(cluster.endpoints)):
            with pytest.raises(EtcdRefused):
                wrong.get(keys.node("a"))
            wrong.close()


def test_a_token_from_before_a_wipe(keys: Keys) -> None:
    """Such a token names a revision that the new members have yet to reach; they would wait."""
    with EtcdCluster(3, "secret") as cluster:
        etcd = Etcd(cluster.endpoints, user="root", password="secret", call_timeout=0.5)
        try:
            etcd.put(keys.node("a"), b"1")
            cluster.restart_all(wipe=True)
            assert etcd.put(keys.node("a"), b"2")
            cluster.heal()  # the users are there again
            assert etcd.put(keys.node("a"), b"3")
        finally:
            etcd.close()
