"""What a node announces is what the others see; and it costs little."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.control.etcd import protobuf
from llumnix.control.etcd.channel import Member
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdUnavailable
from llumnix.control.etcd.session import Session
from llumnix.control.etcd.types import KeyValue
from llumnix.control.keys import Keys
from llumnix.control.registry import REPORT_INTERVAL, LoadReporter, Registry
from tests.kit.etcd import EtcdCluster
from tests.kit.wait import eventually

NODE = NodeInfo("a", "10.0.0.1:8000", "1.0", 7, 2, 1)
INSTANCE = InstanceInfo("a-0", "a", "opt", InstanceState.READY, 1000, 16)
LOAD = InstanceLoad("a-0", running=3, used_blocks=40, received={"b": 12})


@pytest.fixture
def registry(
    etcd: Etcd, session: Session, keys: Keys, closing: Callable[[Callable[[], object]], None]
) -> Registry:
    registry = Registry(etcd, session, keys)
    registry.start()
    closing(registry.stop)
    assert registry.wait_view(5)
    return registry


def test_everything_is_in_the_view(
    etcd_member: EtcdCluster, registry: Registry, keys: Keys
) -> None:
    registry.announce_node(NODE)
    registry.announce_instance(INSTANCE)
    registry.report_loads([LOAD])
    etcd_member.ctl("put", keys.desired("a"), "3")
    etcd_member.ctl("put", keys.drain("b-1"), "please")
    eventually(lambda: registry.view.loads and registry.view.draining and registry.view.instances)
    view = registry.view
    assert view.nodes == {"a": NODE}
    assert view.instances == {"a-0": INSTANCE}
    assert view.loads == {"a-0": LOAD}
    assert view.desired == {"a": 3}
    assert view.draining == {"b-1"}
    assert view.leader is None and registry.alive
    starting = replace(INSTANCE, state=InstanceState.STARTING)
    registry.announce_instance(starting)
    eventually(lambda: registry.view.instances == {"a-0": starting})
    etcd_member.ctl("del", keys.drain("b-1"))
    registry.withdraw_instance("a-0")
    eventually(lambda: not registry.view.instances and not registry.view.draining)


def test_a_node_knows_its_instances_before_etcd_does(
    etcd_member: EtcdCluster, registry: Registry, session: Session, keys: Keys
) -> None:
    """Whatever etcd is doing: here nothing is written at all."""
    session.stop()
    views: list[ClusterView] = []
    registry.subscribe(views.append)
    registry.announce_instance(INSTANCE)
    assert registry.view.instances == {"a-0": INSTANCE} == views[-1].instances
    etcd_member.ctl("put", keys.desired("a"), "3")
    eventually(lambda: views[-1].desired == {"a": 3})
    assert registry.view.instances == {"a-0": INSTANCE}
    starting = replace(INSTANCE, state=InstanceState.STARTING)
    registry.announce_instance(starting)
    assert registry.view.instances == {"a-0": starting}
    registry.withdraw_instance("a-0")
    assert not registry.view.instances and not views[-1].instances


def test_what_etcd_shows_is_not_kept_beside_it(
    etcd_member: EtcdCluster, registry: Registry, keys: Keys
) -> None:
    registry.announce_instance(INSTANCE)
    eventually(lambda: etcd_member.ctl("get", keys.instance("a-0")))
    eventually(lambda: not registry._pending)
    registry._session.stop()  # its lease is given back, and the key with it
    eventually(lambda: not registry.view.instances, within=10)


def test_an_operator_can_read_it(etcd_member: EtcdCluster, registry: Registry, keys: Keys) -> None:
    registry.announce_node(NODE)
    registry.report_loads([LOAD])
    eventually(lambda: registry.view.loads and registry.view.nodes)
    shown = etcd_member.ctl("get", "--prefix", keys.prefix)
    assert shown.splitlines() == [
        keys.load("a"),
        '{"loads":{"a-0":{"running":3,"waiting":0,"used_blocks":40,'
        '"waiting_blocks":0,"head_blocks":0,"prefill_tokens":0,'
        '"preempted":0,"preemptions":0,"priorities":{},"received":{"b":12}}}}',
        keys.node("a"),
        '{"address":"10.0.0.1:8000","version":"1.0","epoch":7,"max_instances":2,'
        '"initial_instances":1,"token_mark":"","api_servers":1,"peer_address":""}',
    ]


def test_bad_values_are_skipped(
    etcd_member: EtcdCluster, registry: Registry, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    etcd_member.ctl("put", keys.desired("a"), "many")
    etcd_member.ctl("put", keys.desired("b"), "--", "-1")
    etcd_member.ctl("put", keys.node("x"), "{")
    etcd_member.ctl("put", keys.instance("x"), '{"node": 5}')
    etcd_member.ctl("put", keys.desired("c"), "2")
    eventually(lambda: registry.view.desired == {"c": 2})
    etcd_member.ctl("put", keys.desired("c"), "3")
    eventually(lambda: registry.view.desired == {"c": 3})
    assert not registry.view.nodes and not registry.view.instances
    ignored = [r.getMessage() for r in caplog.records if "is ignored" in r.getMessage()]
    assert len(ignored) == 4, "each is told once"


def test_load_writes_are_few(etcd: Etcd, registry: Registry, keys: Keys) -> None:
    registry.announce_node(NODE)
    registry.report_loads([LOAD])
    eventually(lambda: registry.view.loads)
    before = _writes(etcd, keys)
    n = 0

    async def steps() -> None:
        nonlocal n
        reporter = LoadReporter(lambda: [replace(LOAD, running=n)], registry.report_loads)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            n += 1
            reporter.changed()
            await asyncio.sleep(0.002)
        await asyncio.sleep(2 * REPORT_INTERVAL)
        reporter.stop()

    asyncio.run(steps())
    eventually(lambda: registry.view.loads["a-0"].running == n, within=5)
    assert 3 <= _writes(etcd, keys) - before <= 7
    at_rest = _writes(etcd, keys)
    for _ in range(100):
        registry.report_loads([replace(LOAD, running=n)])
        time.sleep(0.005)
    assert _writes(etcd, keys) == at_rest


def _writes(etcd: Etcd, keys: Keys) -> int:
    response, _ = etcd._call("range", protobuf.read(keys.load("a")), "count writes")
    return int(response.kvs[0].version)


def test_unchanged_parts_are_shared(etcd: Etcd, registry: Registry, keys: Keys) -> None:
    views: list[ClusterView] = []
    registry.subscribe(views.append)
    registry.announce_node(NODE)
    eventually(lambda: views)
    registry.report_loads([LOAD])
    eventually(lambda: views[-1].loads)  # a reader is told after the view has changed
    assert views[-1].nodes is views[0].nodes
    told = len(views)
    revision = etcd.put(keys.c10d("pair") + "x", b"nothing of ours")
    eventually(lambda: registry.view.revision >= revision)
    assert len(views) == told, "nothing changed that a view tells"


def test_a_leader_that_no_view_showed_has_gone_all_the_same(
    etcd_member: EtcdCluster, etcd: Etcd, registry: Registry, keys: Keys
) -> None:
    views: list[ClusterView] = []
    held, go_on = threading.Event(), threading.Event()

    def read(view: ClusterView) -> None:
        views.append(view)
        held.set()
        go_on.wait(5)

    registry.subscribe(read)
    registry.announce_node(NODE)
    assert held.wait(5), "the watch stands still from here on"
    etcd_member.ctl("put", keys.leader, '{"node":"b"}')
    assert etcd.delete(keys.leader)
    revision = etcd.put(keys.c10d("pair") + "x", b"nothing of ours")
    go_on.set()
    eventually(lambda: registry.view.revision >= revision)
    eventually(lambda: len(views) == 2)
    assert [view.leader for view in views] == [None, None], "who led was never seen"


def test_the_first_list_is_told_though_it_is_empty(
    etcd: Etcd, session: Session, keys: Keys, closing: Callable[[Callable[[], object]], None]
) -> None:
    registry = Registry(etcd, session, keys)
    views: list[ClusterView] = []
    registry.subscribe(views.append)
    closing(registry.stop)
    registry.start()
    eventually(lambda: len(views) == 1)
    assert views[0].leader is None and views[0].revision > 0


def test_a_key_that_somebody_deleted_comes_back(
    etcd_member: EtcdCluster, registry: Registry, keys: Keys
) -> None:
    known: list[bool] = []
    registry.subscribe(lambda view: known.append("a" in view.nodes))
    registry.announce_node(NODE)
    eventually(lambda: known == [True])
    etcd_member.ctl("del", keys.node("a"))
    eventually(lambda: known == [True, False, True])


def test_a_frozen_members_late_write_does_not_stay(
    three: EtcdCluster, keys: Keys, closing: Callable[[Callable[[], object]], None]
) -> None:
    """It thaws and carries out a write that was repeated elsewhere and has since been replaced."""
    etcd = Etcd(three.endpoints, call_timeout=0.5)
    session = Session(etcd)
    registry = Registry(etcd, session, keys)
    for stop in (etcd.close, session.stop, registry.stop):
        closing(stop)
    session.start()
    registry.start()
    registry.announce_node(NODE)
    eventually(lambda: registry.view.nodes)
    three.freeze(0)
    for node in (replace(NODE, epoch=8), replace(NODE, epoch=9)):
        registry.announce_node(node)
        eventually(partial(_knows, registry, node))
    three.thaw(0)
    time.sleep(1.5)  # in which the late write comes, and may be seen until its owner repairs it
    eventually(lambda: registry.view.nodes["a"].epoch == 9)


def _knows(registry: Registry, node: NodeInfo) -> bool:
    return registry.view.nodes.get(node.id) == node


def test_loads_need_a_node(registry: Registry) -> None:
    with pytest.raises(RuntimeError):
        registry.report_loads([LOAD])


class SilentEtcd(Etcd):
    """Counts how often it was asked, and never answers."""

    def __init__(self) -> None:
        super().__init__(["127.0.0.1:1"])
        self.lists = 0

    def get_prefix(self, prefix: str, *, at: Member | None = None) -> tuple[list[KeyValue], int]:
        self.lists += 1
        raise EtcdUnavailable("no answer")


def test_a_silent_etcd_is_asked_several_times_within_the_grace(
    keys: Keys, closing: Callable[[Callable[[], object]], None]
) -> None:
    etcd = SilentEtcd()
    closing(etcd.close)
    registry = Registry(etcd, Session(etcd, ttl=0.6), keys, grace=0.6)
    registry.start()
    closing(registry.stop)
    eventually(lambda: etcd.lists >= 12, within=3)
