"""The mirror of a prefix stays true whatever happens to the members."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping

import pytest
from pyetcd import etcdrpc as pb

from llumnix.control.etcd.channel import Member
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdUnavailable
from llumnix.control.etcd.types import KeyValue
from llumnix.control.etcd.watch import PrefixWatch
from llumnix.control.etcd.watch_stream import Feed, Proof
from llumnix.control.keys import Keys
from tests.kit.etcd import EtcdCluster
from tests.kit.wait import eventually


class Mirror:
    """What a watch last told, as plain values."""

    def __init__(self, endpoints: list[str], keys: Keys) -> None:
        self.etcd = Etcd(endpoints)
        self.items: dict[str, bytes] = {}
        self.revisions: list[int] = []
        self.lists = 0
        self.watch = PrefixWatch(self.etcd, keys.prefix, self._take)

    def _take(
        self, items: Mapping[str, KeyValue], revision: int, deleted: Collection[str] | None
    ) -> None:
        self.items = {key: kv.value for key, kv in items.items()}
        self.revisions.append(revision)
        self.lists += deleted is None

    def stop(self) -> None:
        self.watch.stop()
        self.etcd.close()


@pytest.fixture
def mirror_of(
    keys: Keys, closing: Callable[[Callable[[], object]], None]
) -> Iterator[Callable[[EtcdCluster], Mirror]]:
    def start(cluster: EtcdCluster) -> Mirror:
        mirror = Mirror(cluster.endpoints, keys)
        mirror.watch.start()
        closing(mirror.stop)
        assert mirror.watch.wait_listed(5)
        return mirror

    yield start


MirrorOf = Callable[[EtcdCluster], Mirror]


def test_first_list_then_changes(
    etcd_member: EtcdCluster, etcd: Etcd, keys: Keys, mirror_of: MirrorOf
) -> None:
    etcd.put(keys.node("a"), b"1")
    mirror = mirror_of(etcd_member)
    assert mirror.items == {keys.node("a"): b"1"}
    etcd.put(keys.node("b"), b"2")
    etcd.delete(keys.node("a"))
    took = eventually(lambda: mirror.items == {keys.node("b"): b"2"})
    assert took < 1.2
    assert mirror.revisions == sorted(mirror.revisions)


def test_empty_prefix_is_told_and_proven(etcd_member: EtcdCluster, mirror_of: MirrorOf) -> None:
    mirror = mirror_of(etcd_member)
    assert mirror.items == {} and len(mirror.revisions) == 1
    proven = mirror.watch._proven
    assert mirror.watch.alive
    eventually(lambda: mirror.watch._proven > proven)  # a probe, with nothing happening
    assert mirror.watch.alive


def test_many_changes_arrive_complete(
    etcd_member: EtcdCluster, etcd: Etcd, keys: Keys, mirror_of: MirrorOf
) -> None:
    mirror = mirror_of(etcd_member)
    for i in range(300):
        etcd.put(keys.node(f"n{i % 50}"), str(i).encode())
    want = {keys.node(f"n{i % 50}"): str(i).encode() for i in range(250, 300)}
    eventually(lambda: mirror.items == want)


def test_a_reader_that_fails_does_not_end_the_watch(
    etcd_member: EtcdCluster,
    etcd: Etcd,
    keys: Keys,
    closing: Callable[[Callable[[], object]], None],
) -> None:
    seen: list[int] = []

    def reader(items: Mapping[str, KeyValue], revision: int, deleted: object) -> None:
        seen.append(len(items))
        raise RuntimeError("a fault of the reader")

    watch = PrefixWatch(etcd, keys.prefix, reader)
    watch.start()
    closing(watch.stop)
    assert watch.wait_listed(5)
    etcd.put(keys.node("a"), b"1")
    eventually(lambda: seen == [0, 1])


def test_a_feed_tells_before_it_waits_for_a_proof(etcd: Etcd, keys: Keys) -> None:
    asked: list[float] = []
    feed = Feed(
        *(etcd, etcd.current(), keys.prefix, etcd.get_prefix(keys.prefix)[1] + 1, 0.2),
        on_ask=lambda: asked.append(time.monotonic()),
    )
    began = time.monotonic()
    feed.start()
    proof = feed.next()
    feed.stop()
    assert isinstance(proof, Proof) and len(asked) == 1
    assert began + 0.2 <= asked[0] <= proof.asked


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_survives_its_member(
    three: EtcdCluster, keys: Keys, mirror_of: MirrorOf, fault: str
) -> None:
    mirror = mirror_of(three)
    getattr(three, fault)(0)
    writer = Etcd(three.endpoints[1:])
    eventually(lambda: _put(writer, keys.node("a")))
    took = eventually(lambda: keys.node("a") in mirror.items)
    print(f"\nwatch after {fault}: {took:.2f} s")
    writer.delete(keys.node("a"))
    eventually(lambda: mirror.items == {}, within=5)
    writer.close()


def test_a_list_that_brings_nothing_new_is_told(
    three: EtcdCluster, keys: Keys, mirror_of: MirrorOf
) -> None:
    """Leases that nobody could prolong end behind it, and what they delete is not lost for that."""
    mirror = mirror_of(three)
    before, known = mirror.items, mirror.lists
    three.kill(three.endpoints.index(mirror.etcd.current().endpoint))
    eventually(lambda: mirror.lists > known, within=20)
    assert mirror.items == before


def test_survives_the_frozen_leader(three: EtcdCluster, keys: Keys, mirror_of: MirrorOf) -> None:
    mirror = mirror_of(three)
    leader = three.leader()
    three.freeze(leader)
    writer = Etcd([e for i, e in enumerate(three.endpoints) if i != leader])
    eventually(lambda: _put(writer, keys.node("a")))
    took = eventually(lambda: keys.node("a") in mirror.items)
    print(f"\nwatch after the leader froze and a write succeeded: {took:.2f} s")
    writer.close()


def _put(etcd: Etcd, key: str) -> bool:
    try:
        return etcd.put(key, b"1") > 0
    except EtcdUnavailable:
        return False


def test_compaction_and_restart(keys: Keys, mirror_of: MirrorOf) -> None:
    """While its only member is frozen nothing is known; then it restarts, its history gone."""
    with EtcdCluster(1) as cluster:
        mirror = mirror_of(cluster)
        etcd = Etcd(cluster.endpoints)
        etcd.put(keys.node("a"), b"1")
        eventually(lambda: mirror.items == {keys.node("a"): b"1"})
        cluster.freeze(0)
        eventually(lambda: not mirror.watch.alive)
        assert mirror.items == {keys.node("a"): b"1"}, "the last snapshot must stay"
        cluster.restart(0)
        cluster.wait_ready()
        revision = etcd.put(keys.node("b"), b"2")
        cluster.ctl("compact", str(revision))
        eventually(lambda: set(mirror.items) == {keys.node("a"), keys.node("b")})
        eventually(lambda: mirror.watch.alive)
        mirror.stop()
        etcd.close()


def test_a_compacted_revision_is_listed_again(
    etcd_member: EtcdCluster, etcd: Etcd, keys: Keys
) -> None:
    """The list and the watch may be far apart when the node was stopped in between."""
    late = Compacted(etcd_member.endpoints)
    seen: list[Mapping[str, KeyValue]] = []
    watch = PrefixWatch(late, keys.prefix, lambda items, *_: seen.append(items))
    watch.start()
    eventually(lambda: seen and keys.node("late") in seen[-1])
    watch.stop()
    late.close()


class Compacted(Etcd):
    """Its first list is followed by a write and a compaction before the watch begins."""

    def get_prefix(self, prefix: str, *, at: Member | None = None) -> tuple[list[KeyValue], int]:
        listed, revision = super().get_prefix(prefix, at=at)
        if not listed:
            self.put(prefix + "nodes/late", b"1")
            self.put(prefix + "nodes/other", b"1")
            assert at is not None
            now = self.put(prefix + "nodes/other", b"2")
            at._channel.unary_unary(
                "/etcdserverpb.KV/Compact",
                request_serializer=pb.CompactionRequest.SerializeToString,
                response_deserializer=pb.CompactionResponse.FromString,
            )(pb.CompactionRequest(revision=now), timeout=2)
        return listed, revision
