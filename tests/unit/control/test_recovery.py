"""After every fault of etcd the registry is right again, and nobody was evicted meanwhile."""

import logging
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.config import Config
from llumnix.control.codec import encode_text
from llumnix.control.election import Election
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.session import Session, fitting_timeout, interval_of
from llumnix.control.keys import Keys
from llumnix.control.registry import Registry
from llumnix.node.control_plane import ControlPlane
from tests.kit.etcd import EtcdCluster, free_ports
from tests.kit.wait import eventually
from tests.unit.control.test_election import only_when_told

pytestmark = pytest.mark.slow

Closing = Callable[[Callable[[], object]], None]
TTL = 3.0
GRACE = 5.0  # longer than a node has, so that a stall of the machine evicts nobody


class Member:
    """A node's whole side of the control plane, and every set of nodes that it has seen."""

    def __init__(self, endpoints: list[str], keys: Keys, name: str, **options: str) -> None:
        self.name = name
        self.etcd = Etcd(endpoints, call_timeout=0.5, **options)
        self.session = Session(self.etcd, TTL)
        self.session.keep(keys.token, encode_text("secret"))
        self.registry = Registry(self.etcd, self.session, keys, grace=GRACE)
        self.election = Election(self.etcd, self.session, keys, name, interval=TTL / 3)
        self.seen: list[tuple[int, int]] = []  # how many nodes and instances
        self.registry.subscribe(self._take)
        self.registry.subscribe(self.election.observe)

    def _take(self, view: ClusterView) -> None:
        self.seen.append((len(view.nodes), len(view.instances)))

    def start(self) -> "Member":
        name = self.name
        self.session.start()
        self.registry.start()
        self.registry.announce_node(NodeInfo(name, "10.0.0.1:1", "1", 1))
        self.registry.announce_instance(
            InstanceInfo(f"{name}-0", name, "m", InstanceState.READY, 100, 16)
        )
        self.registry.report_loads([InstanceLoad(f"{name}-0", running=3)])
        self.election.start()
        return self

    def stop(self) -> None:
        self.election.stop()
        self.registry.stop()
        self.session.stop()
        self.etcd.close()


@pytest.fixture
def members(three: EtcdCluster, keys: Keys, closing: Closing) -> list[Member]:
    both = [Member(three.endpoints, keys, name) for name in ("a", "b")]
    for member in both:
        closing(member.stop)
        member.start()
    eventually(lambda: right(both, three, keys))
    for member in both:
        member.seen.clear()
    return both


def right(members: list[Member], etcd: EtcdCluster, keys: Keys) -> bool:
    """Whether etcd holds all that it should, and each member sees it; asked of a healthy etcd."""
    try:
        held = set(etcd.ctl("get", "--prefix", "--keys-only", keys.prefix).split())
    except (AssertionError, subprocess.TimeoutExpired):
        return False  # it does not answer yet
    wanted = {keys.leader, keys.token}
    for name in ("a", "b"):
        wanted |= {keys.node(name), keys.instance(f"{name}-0"), keys.load(name)}
    views = [member.registry.view for member in members]
    return (
        held == wanted
        and all(len(v.nodes) == len(v.instances) == len(v.loads) == 2 for v in views)
        and sum(member.election.epoch > 0 for member in members) == 1
        and len({view.leader for view in views} - {None}) == 1
        and all(member.registry.alive for member in members)
    )


def quorum_lost(etcd: EtcdCluster) -> None:
    for i in (0, 1):
        etcd.freeze(i)
    time.sleep(TTL + 2)  # longer than every lease: the silence itself is the fault
    for i in (0, 1):
        etcd.thaw(i)


FAULTS: dict[str, Callable[[EtcdCluster], None]] = {
    "member killed": lambda etcd: etcd.kill(0),
    "leader frozen": lambda etcd: etcd.freeze(etcd.leader()),
    "quorum lost": quorum_lost,
    "all restarted": lambda etcd: etcd.restart_all(),
    "all wiped": lambda etcd: etcd.restart_all(wipe=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nobody_is_evicted_and_all_is_right_again(
    members: list[Member], three: EtcdCluster, keys: Keys, fault: str
) -> None:
    FAULTS[fault](three)
    well = [e for i, e in enumerate(three.endpoints) if i not in three._frozen]
    well = [e for e in well if three._processes[three.endpoints.index(e)]]
    took = eventually(lambda: right(members, Reached(three, well), keys), within=40, every=0.1)
    print(f"\nright again {took:.1f} s after: {fault}")
    for member in members:
        assert set(member.seen) <= {(2, 2)}, "somebody was evicted"


class Reached(EtcdCluster):
    """The members that answer."""

    def __init__(self, all_of: EtcdCluster, endpoints: list[str]) -> None:
        self._all, self.endpoints = all_of, endpoints

    def ctl(self, *args: str, endpoints: object = None) -> str:
        return self._all.ctl(*args, endpoints=self.endpoints)


def test_a_lease_revoked_by_hand(members: list[Member], three: EtcdCluster, keys: Keys) -> None:
    """Its keys are seen to go, so they are gone, and are back before any lease ends."""
    a = members[0].session
    lease = a.lease
    three.ctl("lease", "revoke", f"{lease:x}")
    eventually(lambda: a.lease not in (0, lease))
    took = eventually(lambda: members[1].seen[-1:] == [(2, 2)])
    assert took < TTL - 1 and min(members[1].seen) < (2, 2), "a deletion that is seen is believed"
    eventually(lambda: right(members, three, keys))


def test_who_does_not_come_back_leaves_when_the_grace_ends(
    members: list[Member], three: EtcdCluster, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    a, b = members
    for i in range(3):
        three.kill(i)
    eventually(lambda: caplog.text.count("etcd is silent") == 2)  # both have said so
    b.stop()
    for i in range(3):
        three.restart(i, wipe=True)
    eventually(lambda: "to come back" in caplog.text, within=20)
    assert a.registry.view.nodes.keys() == {"a", "b"}
    eventually(lambda: a.registry.view.nodes.keys() == {"a"}, within=GRACE + 15)
    assert not a.registry.view.instances.keys() & {"b-0"}
    when = {
        text: next((r.created for r in caplog.records if text in r.getMessage()), 0.0)
        for text in ("to come back", "Node b has left.")
    }
    assert when["Node b has left."] - when["to come back"] > GRACE / 2
    for sentence in (
        "etcd is silent, so this node goes on with its view",
        "etcd answers again, after",
        "etcd lacks",
        "did not come back within 5.0 s, so they are gone",
        "Node b has left.",
        "Instance b-0 of node b has left.",
        "The lease is unknown",
        "The lease is lost",
        "The lease is held",
    ):
        assert sentence in caplog.text, sentence
    eventually(lambda: f"This node (a) leads, in epoch {a.election.epoch}." in caplog.text)


def test_a_leader_that_retires_hands_over_at_once_and_for_good(
    members: list[Member], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    leader, other = sorted(members, key=lambda m: not m.election.epoch)
    epoch = leader.election.epoch
    only_when_told(other.election)
    leader.election.retire()
    assert not leader.election.epoch
    eventually(lambda: other.election.epoch, within=5)
    assert other.election.epoch > epoch
    assert f"This node ({leader.name}) resigns, in epoch {epoch}, and stands no more." in (
        caplog.text
    )
    other.election.resign()
    eventually(lambda: leader.registry.view.leader is None)
    time.sleep(TTL / 2)  # more than the interval at which it would stand
    assert leader.registry.view.leader is None, "who has retired never leads again"


def test_the_token_expires_and_the_first_endpoint_is_dead(keys: Keys) -> None:
    """A node whose user's token etcd does not know any more goes on watching and writing."""
    with EtcdCluster(1, "secret") as cluster:
        endpoints = [f"127.0.0.1:{free_ports(1)[0]}", *cluster.endpoints]
        member = Member(endpoints, keys, "a", user="root", password="secret").start()
        try:
            eventually(lambda: member.seen[-1:] == [(1, 1)])
            cluster.restart(0)  # simple tokens live in the member's memory
            changed = NodeInfo("a", "10.0.0.1:2", "1", 2)
            member.registry.announce_node(changed)
            eventually(lambda: member.registry.view.nodes == {"a": changed})
            assert set(member.seen[-2:]) == {(1, 1)}
        finally:
            member.stop()


def test_a_keep_alive_may_fail_once(caplog: pytest.LogCaptureFixture) -> None:
    assert fitting_timeout(6.0, 1.5) == 1.5 and not caplog.records
    fitted = fitting_timeout(3.0, 1.5)
    assert interval_of(3.0) + 2 * fitted <= 3.0 and len(caplog.records) == 1
    assert "An etcd timeout of 1.50 s is too long for a lease of 3.0 s" in caplog.text


@pytest.fixture
def plane(etcd_member: EtcdCluster, keys: Keys) -> ControlPlane:
    cluster = keys.prefix.split("/")[2]
    config = Config(
        cluster=cluster, node="a", advertise_address="127.0.0.1:1",
        etcd_endpoints=etcd_member.endpoints, lease_ttl=2.0,
    )  # fmt: skip
    return ControlPlane(config)


def test_a_loop_that_hangs_is_named(plane: ControlPlane) -> None:
    hang, on = threading.Event(), threading.Event()
    plane.open(lambda view: hang.is_set() and on.wait(20), lambda record: None)
    try:
        plane.join()
        eventually(lambda: plane.registry.view.nodes)
        pulses = plane.session.pulse, plane.registry.pulse, plane.election.pulse
        assert plane.standstill() == "" and max(pulse.age for pulse in pulses) < 2
        hang.set()
        plane.session.put(f"/llumnix/{plane._config.cluster}/drain/x", b"1")
        eventually(plane.standstill)
        assert plane.standstill().startswith("the control loop stands still: the watch came")
    finally:
        on.set()
        plane.close()


def test_an_outage_is_no_standstill(keys: Keys) -> None:
    with EtcdCluster(1) as cluster:
        config = Config(
            cluster="c", node="a", advertise_address="127.0.0.1:1",
            etcd_endpoints=cluster.endpoints, lease_ttl=4.0,
        )  # fmt: skip
        plane = ControlPlane(config)
        plane.open(lambda view: None, lambda record: None)
        try:
            plane.join()
            eventually(lambda: plane.registry.view.nodes)
            cluster.freeze(0)
            until = time.monotonic() + 6.0
            while time.monotonic() < until:
                assert plane.standstill() == ""
                time.sleep(0.05)
            assert not plane.registry.alive
            cluster.thaw(0)
            eventually(lambda: plane.registry.alive)
        finally:
            plane.close()
