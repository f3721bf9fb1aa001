"""Numbers of instances are written only by who leads, and never over somebody else's word."""

import pytest

from llumnix.cluster import ClusterView
from llumnix.control.desired import Wish, put_desired
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdRefused
from llumnix.control.etcd.types import Compare, KeyValue, Op, TxnResult
from llumnix.control.keys import Keys
from llumnix.control.view import ViewBuilder
from tests.kit.etcd import EtcdCluster


@pytest.fixture
def epoch(etcd: Etcd, keys: Keys) -> int:
    """Of a node that leads."""
    _, found = etcd.put_if_absent(keys.leader, b'{"node":"a"}')
    return found.create_revision


def seen(etcd: Etcd, keys: Keys) -> ClusterView:
    items, revision = etcd.get_prefix(keys.prefix)
    return ViewBuilder(keys).build({item.key: item for item in items}, revision)


def test_an_operator_can_read_what_is_wished_and_put_it_himself(
    etcd_member: EtcdCluster, etcd: Etcd, keys: Keys, epoch: int
) -> None:
    put_desired(etcd, keys, Wish(epoch, {"a": 2, "b": 1}, {}))
    put_desired(etcd, keys, Wish(epoch, {"b": 0}, {"a": 2, "b": 1}, without="b-0"))
    shown = etcd_member.ctl("get", "--prefix", f"{keys.prefix}desired/")
    assert shown.splitlines() == [
        *(keys.desired("a"), "2"),
        *(keys.desired("b"), '{"instances":0,"without":"b-0"}'),
    ]
    view = seen(etcd, keys)
    assert (view.desired, view.without) == ({"a": 2, "b": 0}, {"b": "b-0"})
    etcd_member.ctl("put", keys.desired("a"), '{"instances": 1, "without": "a-0"}')
    etcd_member.ctl("put", keys.desired("b"), "3")
    view = seen(etcd, keys)
    assert (view.desired, view.without) == ({"a": 1, "b": 3}, {"a": "a-0"})


def test_who_was_deposed_writes_nothing(etcd: Etcd, keys: Keys, epoch: int) -> None:
    etcd.delete(keys.leader)
    with pytest.raises(EtcdRefused, match=f"not lead any more, as it did in epoch {epoch}"):
        put_desired(etcd, keys, Wish(epoch, {"a": 2}, {}))
    etcd.put_if_absent(keys.leader, b'{"node":"a"}')  # the same node, in another term
    with pytest.raises(EtcdRefused, match="does not lead any more"):
        put_desired(etcd, keys, Wish(epoch, {"a": 2}, {}))
    assert etcd.get(keys.desired("a")) is None


def test_what_an_operator_has_put_meanwhile_stays(etcd: Etcd, keys: Keys, epoch: int) -> None:
    etcd.put(keys.desired("a"), b"4")
    with pytest.raises(EtcdRefused, match=r"^4 are desired on a, and no longer 1 are desired"):
        put_desired(etcd, keys, Wish(epoch, {"a": 2, "b": 1}, {"a": 1}))
    with pytest.raises(EtcdRefused, match=r"^4 are desired on a, and no longer no number"):
        put_desired(etcd, keys, Wish(epoch, {"a": 2}, {}))
    with pytest.raises(EtcdRefused, match=r"^no number is desired on b, and no longer 1"):
        put_desired(etcd, keys, Wish(epoch, {"b": 2}, {"b": 1}))
    assert seen(etcd, keys).desired == {"a": 4}


def test_what_is_put_between_the_look_and_the_write_stays(
    etcd_member: EtcdCluster, keys: Keys, epoch: int, monkeypatch: pytest.MonkeyPatch, etcd: Etcd
) -> None:
    write = Etcd.txn

    def late(etcd: Etcd, when: list[Compare], then: list[Op], otherwise: list[Op]) -> TxnResult:
        etcd_member.ctl("put", keys.desired("b"), "9")
        return write(etcd, when, then, otherwise)

    monkeypatch.setattr(Etcd, "txn", late)
    with pytest.raises(EtcdRefused, match=r"^what is desired on a, b was changed meanwhile"):
        put_desired(etcd, keys, Wish(epoch, {"a": 2, "b": 1}, {}))
    assert seen(etcd, keys).desired == {"b": 9}


def test_what_no_node_understands_counts_as_nothing(etcd: Etcd, keys: Keys, epoch: int) -> None:
    etcd.put(keys.desired("a"), b"many")
    put_desired(etcd, keys, Wish(epoch, {"a": 2}, {}))
    assert seen(etcd, keys).desired == {"a": 2}
    found = etcd.get(keys.desired("a"))
    assert isinstance(found, KeyValue) and found.value == b"2"
