"""A transfer group meets through etcd, in time or not at all, and leaves nothing behind."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import DistStoreError, HashStore, PrefixStore, ProcessGroupGloo, Store

from llumnix.control.c10d_store import EtcdStore
from llumnix.control.etcd.client import Etcd
from llumnix.control.keys import Keys
from tests.kit.etcd import EtcdCluster
from tests.kit.wait import eventually

MakeStore = Callable[..., EtcdStore]

# Rank 1, as a worker is made: forked from a process that has imported the store, then handed plain
# arguments. It adds one to what it is sent.
PEER = """
import importlib, json, os, sys, threading
from datetime import timedelta
import torch
module, _, name = "llumnix.control.c10d_store:EtcdStore".partition(":")
factory = getattr(importlib.import_module(module), name)
assert threading.active_count() == 1
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
store = factory(**json.loads(sys.argv[1]))
group = torch.distributed.ProcessGroupGloo(store, 1, 2, timedelta(seconds=60))
tensor = torch.zeros(5)
group.recv([tensor], 0, 0).wait(timedelta(seconds=60))
group.send([tensor + 1], 0, 0).wait(timedelta(seconds=60))
store.close()
"""


@pytest.fixture
def make(etcd_member: EtcdCluster, keys: Keys) -> Iterator[MakeStore]:
    """Stores of one rendezvous, closed in the end."""
    stores: list[EtcdStore] = []

    def make(**kwargs: Any) -> EtcdStore:
        stores.append(EtcdStore(**_arguments(etcd_member, keys) | kwargs))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def _arguments(cluster: EtcdCluster, keys: Keys) -> dict[str, Any]:
    return {"endpoints": cluster.endpoints, "prefix": keys.c10d("a-b.1"), "timeout": 60.0}


def _leases(cluster: EtcdCluster) -> set[str]:
    """The leases that etcd has, those of earlier tests that are about to end among them."""
    return set(cluster.ctl("lease", "list").splitlines()[1:])


def _group(store: Store, rank: int, seconds: float = 60.0) -> ProcessGroupGloo:
    return ProcessGroupGloo(store, rank, 2, timedelta(seconds=seconds))


def test_two_processes_exchange_tensors(
    etcd_member: EtcdCluster, etcd: Etcd, keys: Keys, make: MakeStore
) -> None:
    leases = _leases(etcd_member)
    arguments = json.dumps(_arguments(etcd_member, keys))
    peer = subprocess.Popen([sys.executable, "-c", PEER, arguments])
    try:
        store = make()
        group = _group(store, 0)
        limit = timedelta(seconds=60)
        tensor = torch.arange(5.0)
        group.send([tensor], 1, 0).wait(limit)
        group.recv([tensor], 1, 0).wait(limit)
        assert tensor.tolist() == [1, 2, 3, 4, 5]
        assert peer.wait(60) == 0
    finally:
        peer.kill()
        peer.wait()
    assert store.num_keys() == 1, "only what the other wrote is gone"
    store.close()
    store.close()
    assert etcd.get_prefix(keys.prefix)[0] == []
    assert _leases(etcd_member) <= leases


def test_keys_are_gone_when_both_have_closed(etcd: Etcd, keys: Keys, make: MakeStore) -> None:
    stores = [make(), make()]
    groups: list[ProcessGroupGloo] = []
    threads = [
        threading.Thread(target=lambda rank=rank: groups.append(_group(stores[rank], rank)))
        for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(groups) == 2
    listed, _ = etcd.get_prefix(keys.c10d("a-b.1"))
    assert len(listed) == 2 and all(kv.lease for kv in listed)
    stores[0].close()
    assert stores[1].num_keys() == 1
    stores[1].close()
    assert etcd.get_prefix(keys.prefix)[0] == []


def test_the_other_never_comes(make: MakeStore) -> None:
    began = time.monotonic()
    with pytest.raises(DistStoreError, match=r"could not wait 1\.0 s for .* nobody has written it"):
        _group(make(timeout=5.0), 0, seconds=1.0)
    assert time.monotonic() - began < 4.5


def test_a_wait_ends_in_time_and_lets_other_threads_run(make: MakeStore) -> None:
    store = make(timeout=0.5)
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.01):
            ticks += 1

    other = threading.Thread(target=tick)
    other.start()
    waits: list[Callable[[], object]] = [
        lambda: store.get("a"),
        lambda: store.wait(["a"]),
        lambda: PrefixStore("p", store).get("a"),
        lambda: PrefixStore("p", store).wait(["a"], timedelta(seconds=0.5)),
    ]
    for wait in waits:
        began = time.monotonic()
        with pytest.raises(DistStoreError, match="nobody has written it"):
            wait()
        assert 0.5 <= time.monotonic() - began < 4
    done.set()
    other.join()
    assert ticks > 50


def test_it_does_as_torchs_own_store(make: MakeStore) -> None:
    """Through a PrefixStore, so that each call goes from C++ to Python, as a group's calls do."""

    def use(store: Store) -> list[object]:
        store = PrefixStore("p", store)
        store.set("a", "1")
        return [
            store.get("a"),
            store.set("a", b"\x00\xff"),
            store.get("a"),
            store.check(["a"]),
            store.check(["a", "b"]),
            [store.add("n", amount) for amount in (1, 5, -2)],
            store.get("n"),
            store.compare_set("a", "x", "y"),
            store.compare_set("a", b"\x00\xff", "y"),
            store.compare_set("c", "x", "y"),
            store.check(["c"]),
            store.compare_set("c", "", "y"),
            store.compare_set("c", "", "z"),
            store.append("l", "po"),
            store.append("l", "tato"),
            store.multi_set(["m", "o"], ["1", "2"]),
            store.multi_get(["l", "m", "o"]),
            store.wait(["a", "m"]),
            store.wait(["a", "m"], timedelta(seconds=1)),
            store.num_keys(),
            store.delete_key("a"),
            store.delete_key("a"),
            store.num_keys(),
            store.has_extended_api(),
            store.clone().get("m"),
        ]

    assert use(make()) == use(HashStore())


def test_timeout(make: MakeStore) -> None:
    store = make(timeout=0.25)
    assert store.timeout == timedelta(seconds=0.25)
    store.set_timeout(timedelta(seconds=3))
    assert store.timeout == PrefixStore("p", store).timeout == timedelta(seconds=3)


def test_additions_of_two_are_all_counted(make: MakeStore) -> None:
    stores = [make(), make()]
    sums: list[int] = []

    def add(store: EtcdStore) -> None:
        sums.extend(store.add("n", 1) for _ in range(30))

    threads = [threading.Thread(target=add, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sums) == list(range(1, 61))


def test_a_key_of_another_kind(make: MakeStore) -> None:
    store = make()
    store.set("a", "text")
    with pytest.raises(DistStoreError, match="could not write a under"):
        store.add("a", 1)


def test_a_late_key_lives_long_enough(etcd: Etcd, keys: Keys, make: MakeStore) -> None:
    store = make(timeout=1.0, lease_ttl=60.0)
    store.set("a", "1")
    store.set("b", "1")
    store._lease_ends = time.monotonic()  # as if that were so: a wait would outlive the lease
    store.set("c", "1")
    leases = [kv.lease for kv in etcd.get_prefix(keys.c10d("a-b.1"))[0]]
    assert leases[0] == leases[1] != leases[2]
    store.close()
    assert etcd.get_prefix(keys.prefix)[0] == []


def test_nothing_stays_of_a_process_that_died(etcd: Etcd, keys: Keys, make: MakeStore) -> None:
    store = make(timeout=1.0, lease_ttl=2.0)
    store.set("a", "1")
    store._etcd.close()  # as good as dead: it can't even revoke its lease
    assert etcd.get_prefix(keys.prefix)[0]
    eventually(lambda: not etcd.get_prefix(keys.prefix)[0], within=20)


def test_close_ends_a_wait_and_all_later_calls(make: MakeStore) -> None:
    store = make()
    closer = threading.Timer(0.2, store.close)
    closer.start()
    began = time.monotonic()
    with pytest.raises(DistStoreError, match="the store was closed"):
        store.get("a")
    assert time.monotonic() - began < 10
    closer.join()
    calls: list[Callable[[], object]] = [
        lambda: store.get("a"),
        lambda: store.set("a", "1"),
        lambda: store.check(["a"]),
        lambda: store.delete_key("a"),
    ]
    for call in calls:
        with pytest.raises(DistStoreError, match="the store was closed"):
            call()


def test_etcd_may_be_away_for_a_while(keys: Keys) -> None:
    with EtcdCluster(1) as cluster:
        mine, other = (EtcdStore(**_arguments(cluster, keys)) for _ in range(2))
        found: list[bytes] = []
        waiting = threading.Thread(target=lambda: found.append(mine.get("a")))
        waiting.start()
        cluster.kill(0)
        with pytest.raises(DistStoreError, match="no etcd member answered"):
            other.set("a", "0")
        with pytest.raises(DistStoreError, match="no etcd member answered"):
            other.wait(["a"], timedelta(seconds=0.2))
        cluster.restart(0)
        cluster.wait_ready()
        eventually(lambda: _set(other, "a", "1"))
        waiting.join(60)
        assert found == [b"1"]
        mine.close()
        other.close()


def _set(store: EtcdStore, key: str, value: str) -> bool:
    """Whether it could be written; not as long as etcd has no leader."""
    try:
        store.set(key, value)
    except DistStoreError:
        return False
    return True
