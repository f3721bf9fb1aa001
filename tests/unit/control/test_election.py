"""One leader at a time, and soon another when it goes; and each says so, with the epoch."""

import logging
from collections.abc import Callable

import pytest

from llumnix.control.cluster_secrets import made_token
from llumnix.control.election import Election
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.session import Session
from llumnix.control.keys import Keys
from llumnix.control.registry import Registry
from tests.kit.etcd import EtcdCluster
from tests.kit.wait import eventually

Closing = Callable[[Callable[[], object]], None]


class Candidate:
    """A node, as far as elections go."""

    def __init__(self, endpoints: list[str], keys: Keys, name: str, ttl: float = 3) -> None:
        self.name = name
        self.etcd = Etcd(endpoints, call_timeout=0.5)
        self.session = Session(self.etcd, ttl)
        self.election = Election(self.etcd, self.session, keys, name)
        self.registry = Registry(self.etcd, self.session, keys)
        self.registry.subscribe(self.election.observe)
        self.session.put(keys.node(name), b"{}")

    def start(self) -> None:
        self.session.start()
        eventually(lambda: self.session.remaining, within=5)
        self.registry.start()
        self.election.start()

    def stop(self) -> None:
        self.election.stop()
        self.registry.stop()
        self.session.stop()
        self.etcd.close()


@pytest.fixture
def candidates(
    etcd_member: EtcdCluster, keys: Keys, closing: Closing, caplog: pytest.LogCaptureFixture
) -> list[Candidate]:
    caplog.set_level(logging.INFO)
    both = [Candidate(etcd_member.endpoints, keys, name) for name in ("a", "b")]
    for candidate in both:
        closing(candidate.stop)
        candidate.start()
    eventually(lambda: _leaders(both) == 1)
    return sorted(both, key=lambda c: not c.election.epoch)


def _leaders(candidates: list[Candidate]) -> int:
    return sum(c.election.epoch > 0 for c in candidates)


def only_when_told(election: Election) -> None:
    """Have it stand when a view tells it that nobody leads, and no more by its interval."""
    election._interval = 60.0
    election._wake.set()
    eventually(lambda: not election._wake.is_set())  # it looks once more, and waits for that long


def test_one_leads_and_all_know(
    candidates: list[Candidate], caplog: pytest.LogCaptureFixture
) -> None:
    leader, other = candidates
    eventually(lambda: other.registry.view.leader is not None)
    assert other.registry.view.leader_epoch == leader.election.epoch > 0
    assert other.election.epoch == 0
    wanted = [f"This node ({leader.name}) leads, in epoch {leader.election.epoch}."]
    eventually(lambda: _led(caplog) == wanted)


def _led(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What candidates have said of leading, also while the fixture made them."""
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    return [text for r in records if (text := r.getMessage()).startswith("This node")]


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What candidates have said of leading since the test began."""
    return [text for text in caplog.messages if text.startswith("This node")]


def test_resigning_hands_over_at_once(
    candidates: list[Candidate], caplog: pytest.LogCaptureFixture
) -> None:
    leader, other = candidates
    epoch = leader.election.epoch
    assert not other.election.resign(aside=0), "only the leader's key goes when it resigns"
    assert leader.election.resign()
    assert not leader.election.epoch
    took = eventually(lambda: other.election.epoch)
    assert took < 2.5, "the lease has nothing to do with it, which is 3 s long"
    assert other.election.epoch > epoch
    old, new = leader.name, other.name
    wanted = {
        f"This node ({old}) resigns, in epoch {epoch}.",
        f"This node ({old}) does not lead any more, as it did in epoch {epoch}.",
        f"This node ({new}) leads, in epoch {other.election.epoch}.",
    }
    eventually(lambda: set(_said(caplog)) == wanted)
    assert len(_said(caplog)) == len(wanted), "each is said once"


def test_takeover_when_the_lease_ends(candidates: list[Candidate]) -> None:
    leader, other = candidates
    lease = leader.session.lease
    only_when_told(other.election)
    leader.session.stop()
    assert not leader.election.epoch
    other.etcd.lease_revoke(lease)
    eventually(lambda: other.election.epoch, within=5)


def test_a_leader_cut_off_from_etcd_stops_leading_and_takes_up_again(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with EtcdCluster(1) as cluster:
        alone = Candidate(cluster.endpoints, keys, "a", ttl=2)
        alone.start()
        eventually(lambda: alone.election.epoch)
        eventually(lambda: alone.registry.view.leader == "a")
        cluster.kill(0)
        eventually(lambda: not alone.election.epoch)
        eventually(lambda: "does not lead any more" in _said(caplog)[-1])
        assert alone.registry.view.leader == "a", "the last view stays"
        cluster.restart(0)
        cluster.wait_ready()
        eventually(lambda: alone.election.epoch)
        alone.stop()


def test_token_is_agreed_on(etcd_member: EtcdCluster, etcd: Etcd, keys: Keys) -> None:
    token = made_token(etcd, keys.token)
    assert len(token) > 30
    assert made_token(etcd, keys.token) == token
    etcd_member.ctl("put", keys.token, "by hand")
    assert made_token(etcd, keys.token) == "by hand"
