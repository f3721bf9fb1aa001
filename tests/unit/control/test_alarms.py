"""Keys that nobody should have written: noticed, mended or refused, and told."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llumnix.cluster import InstanceInfo, InstanceState, NodeInfo
from llumnix.config import Config
from llumnix.control.alarms import Alarms, Matter
from llumnix.control.cluster_secrets import prevails, token_mark
from llumnix.control.codec import encode_leader, encode_node
from llumnix.control.election import Election, Throne
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdRefused, NameTaken
from llumnix.control.etcd.session import Session
from llumnix.control.keys import Keys
from llumnix.control.name_claim import MORE
from llumnix.metrics import KEY_FAULTS
from llumnix.node.control_plane import ControlPlane
from tests.kit.etcd import EtcdCluster
from tests.kit.wait import eventually

TTL = 2.0
MakePlane = Callable[..., ControlPlane]


def told(alarms: Alarms, matter: Matter) -> str:
    """The sentence about it, if there is one."""
    return " ".join(str(w["sentence"]) for w in alarms.now() if w["about"] == matter)


def counted(matter: Matter) -> float:
    return float(KEY_FAULTS.labels(matter.value)._value.get())


@pytest.fixture
def plane(etcd_member: EtcdCluster, keys: Keys) -> Iterator[MakePlane]:
    """Makes the control planes of nodes, which the test opens."""
    made: list[ControlPlane] = []

    def make(node: str, address: str = "127.0.0.1:1", **more: Any) -> ControlPlane:
        config = Config(
            cluster=keys.prefix.split("/")[2], node=node, advertise_address=address,
            etcd_endpoints=etcd_member.endpoints, lease_ttl=TTL, **more,
        )  # fmt: skip
        made.append(ControlPlane(config))
        return made[-1]

    yield make
    for each in made:
        each.close()


def opened(plane: ControlPlane) -> ControlPlane:
    plane.open(lambda view: None, lambda record: None)
    plane.join()
    return plane


def killed(plane: ControlPlane) -> None:
    """Ends its threads and leaves its lease, as kill -9 does."""
    plane.session._lease = 0
    plane.close()


# ---- the leader ----


@pytest.mark.parametrize(
    "value", [b'{"node": "zz"}', b'{"node": "a"}', b"garbage", b'{"node": "/"}']
)
def test_a_leader_without_a_lease_is_removed(plane: MakePlane, etcd: Etcd, value: bytes) -> None:
    a = opened(plane("a"))
    eventually(lambda: a.election.epoch)
    before, epoch = counted(Matter.LEADER), a.election.epoch
    etcd.put(a._keys.leader, value)
    eventually(lambda: a.election.epoch > epoch, within=10)
    found = etcd.get(a._keys.leader)
    assert found is not None and found.value == encode_leader("a")
    assert "it has no lease" in told(a.alarms, Matter.LEADER)
    assert counted(Matter.LEADER) == before + 1
    eventually(lambda: a.registry.view.leader == "a")


@pytest.mark.parametrize("node", ["zz", "b"], ids=["no node", "another lease than the node's"])
def test_a_leader_that_is_no_node_is_removed_after_a_while(
    etcd: Etcd, session: Session, keys: Keys, node: str
) -> None:
    session.put(keys.node("b"), b"{}")
    eventually(lambda: etcd.get(keys.node("b")))
    lease, _ = etcd.lease_grant(60)
    etcd.put(keys.leader, encode_leader(node), lease)
    alarms, began = Alarms(), time.monotonic()
    election = Election(etcd, session, keys, "a", interval=0.05, patience=0.5, alarms=alarms)
    election.start()
    eventually(lambda: election.epoch)
    election.stop()
    assert time.monotonic() - began >= 0.5
    assert "its lease has kept no node" in told(alarms, Matter.LEADER)


def test_a_leader_that_lives_is_left_alone(etcd: Etcd, session: Session, keys: Keys) -> None:
    session.put(keys.node("b"), b"{}")
    eventually(lambda: etcd.get(keys.node("b")))
    etcd.put(keys.leader, encode_leader("b"), session.lease)
    found = etcd.get(keys.leader)
    assert found is not None
    throne = Throne(etcd, keys, patience=0.0)
    assert throne.fault(found) is None and throne.fault(found) is None
    etcd.put(keys.leader, encode_leader("c"), session.lease)
    assert not throne.clear(found), "it has changed meanwhile"
    changed = etcd.get(keys.leader)
    assert changed is not None and throne.fault(changed) and throne.clear(changed)
    assert etcd.get(keys.leader) is None


# ---- the token ----


def test_a_token_that_is_given_is_the_nodes_own(plane: MakePlane, etcd: Etcd) -> None:
    a = opened(plane("a", cluster_token="as the operator says"))
    assert a.token == "as the operator says" and etcd.get(a._keys.token) is None


@pytest.mark.parametrize("value", [b'"another"', b"bare", b"\xff", b"{}", b""])
def test_an_overwritten_token_is_put_back(plane: MakePlane, etcd: Etcd, value: bytes) -> None:
    a, b = opened(plane("a")), opened(plane("b", "127.0.0.1:2"))
    assert a.token == b.token
    key = a._keys.token
    right = etcd.get(key)
    eventually(lambda: len(a.registry.view.nodes) == len(b.registry.view.nodes) == 2)
    etcd.put(key, value)
    c = opened(plane("c", "127.0.0.1:3"))
    assert c.token == a.token, "it does not come in with the wrong one"
    now = etcd.get(key)
    assert right is not None and now is not None and now.value == right.value
    # One of them that is slow may see only that it is right again.
    eventually(lambda: any("was overwritten" in told(n.alarms, Matter.TOKEN) for n in (a, b)))


def test_the_same_token_in_another_form_is_no_intrusion(plane: MakePlane, etcd: Etcd) -> None:
    a = opened(plane("a"))
    revision = etcd.put(a._keys.token, a.token.encode())
    eventually(lambda: a.registry.view.revision >= revision)
    found = etcd.get(a._keys.token)
    assert found is not None and found.mod_revision == revision
    assert not told(a.alarms, Matter.TOKEN)


@pytest.mark.parametrize("value", [b'"theirs"', b"\xff"])
def test_a_node_does_not_join_with_another_token_than_the_others(
    plane: MakePlane, etcd: Etcd, keys: Keys, value: bytes
) -> None:
    lease, _ = etcd.lease_grant(60)
    other = NodeInfo("b", "127.0.0.1:2", "1", 1, token_mark=token_mark("ours"))
    etcd.put(keys.node("b"), encode_node(other), lease)
    etcd.put(keys.token, value)
    with pytest.raises(EtcdRefused, match="token"):
        opened(plane("a"))
    assert etcd.get(keys.node("a")) is None


def test_the_token_of_most_nodes_prevails() -> None:
    assert prevails("a", [])
    assert prevails("a", ["a", "", ""])
    assert prevails("a", ["a", "b", "a"]) and not prevails("b", ["a", "b", "a"])
    assert prevails("b", ["a", "b"]) and not prevails("a", ["a", "b"]), "never both"


# ---- the name ----


def test_a_second_node_of_one_name_is_refused(plane: MakePlane, etcd: Etcd, keys: Keys) -> None:
    first = opened(plane("a"))
    mine = InstanceInfo("a-0", "a", "m", InstanceState.READY, 100, 16)
    first.registry.announce_instance(mine)
    eventually(lambda: etcd.get(keys.instance("a-0")))
    before = [etcd.get(keys.node("a")), etcd.get(keys.instance("a-0"))]
    began = time.monotonic()
    with pytest.raises(NameTaken, match=r"another process at 127\.0\.0\.1:1 is node a"):
        opened(plane("a", "127.0.0.1:2"))
    assert TTL <= time.monotonic() - began < TTL + MORE + 3
    assert [etcd.get(keys.node("a")), etcd.get(keys.instance("a-0"))] == before


def test_two_that_start_at_once_are_told_apart(plane: MakePlane) -> None:
    both = plane("a"), plane("a", "127.0.0.1:2")
    for each in both:
        each.open(lambda view: None, lambda record: None)
    both[0].join()
    with pytest.raises(NameTaken):
        both[1].join()


def test_after_a_kill_the_name_is_free_with_the_lease(
    plane: MakePlane, etcd: Etcd, keys: Keys
) -> None:
    first = opened(plane("a"))
    first.registry.announce_instance(InstanceInfo("a-0", "a", "m", InstanceState.READY, 1, 16))
    eventually(lambda: etcd.get(keys.instance("a-0")))
    killed(first)
    began = time.monotonic()
    second = opened(plane("a", "127.0.0.1:2"))
    assert time.monotonic() - began < TTL + MORE
    eventually(lambda: "a" in second.registry.view.nodes)
    eventually(lambda: second.registry.view.nodes["a"].address == "127.0.0.1:2")
    eventually(lambda: etcd.get(keys.instance("a-0")) is None)


@pytest.mark.parametrize(
    ("address", "at_once"), [("10.0.0.1:8000", True), ("127.0.0.1:8000", False)]
)
def test_at_its_own_address_a_killed_node_is_back_at_once(
    plane: MakePlane, keys: Keys, etcd: Etcd, address: str, at_once: bool
) -> None:
    """Nobody else can listen there; the loopback address may be that of another machine."""
    lease, _ = etcd.lease_grant(60)
    former = NodeInfo("a", address, "1", 1)
    etcd.put(keys.node("a"), encode_node(former), lease)
    again = plane("a", address)
    if not at_once:
        with pytest.raises(NameTaken):
            again.open(lambda view: None, lambda record: None)
        return
    began = time.monotonic()
    opened(again)
    assert time.monotonic() - began < TTL
    etcd.lease_revoke(lease)
    found = etcd.get(keys.node("a"))
    assert found is not None and found.lease == again.session.lease


def test_an_entry_that_no_lease_keeps_is_nobodys(plane: MakePlane, keys: Keys, etcd: Etcd) -> None:
    etcd.put(keys.node("a"), encode_node(NodeInfo("a", "10.9.9.9:1", "1", 1)))
    began = time.monotonic()
    opened(plane("a"))
    assert time.monotonic() - began < TTL


def test_a_rival_is_told(plane: MakePlane, keys: Keys, etcd: Etcd) -> None:
    a = opened(plane("a"))
    eventually(lambda: a.registry.view.nodes)
    assert not told(a.alarms, Matter.NAME)
    lease, _ = etcd.lease_grant(60)
    etcd.put(keys.node("a"), encode_node(NodeInfo("a", "10.9.9.9:1", "1", 1)), lease)
    eventually(lambda: "Another process, at 10.9.9.9:1" in told(a.alarms, Matter.NAME))
    eventually(lambda: a.registry.view.nodes["a"].address == "127.0.0.1:1")
