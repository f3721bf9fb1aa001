"""A migration's record: one step at a time, taken by one, and never by whoever comes late."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.cluster import ClusterView
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdError, EtcdOutcomeUnknown
from llumnix.control.etcd.session import Session
from llumnix.control.etcd.types import KeyValue
from llumnix.control.keys import Keys, Kind, Parsed
from llumnix.control.registry import Registry
from llumnix.migration.record import (
    TRANSITIONS,
    Handshake,
    HandshakeError,
    MigrationRecord,
    MigrationState,
    _decode,
)
from tests.kit.etcd import EtcdCluster
from tests.kit.wait import eventually

PROPOSED, ACCEPTED, COPYING, COMMITTED, ABORTED = MigrationState
_WAY = [(PROPOSED, ACCEPTED), (ACCEPTED, COPYING), (COPYING, COMMITTED)]
RECORD = MigrationRecord("r", "a-0", "b-1", 3, migration="m1", started=1.5)
LATER = replace(RECORD, migration="m2")

Closing = Callable[[Callable[[], object]], None]


@pytest.fixture
def handshake(etcd: Etcd, session: Session, keys: Keys) -> Handshake:
    return Handshake(etcd, session, keys)


def _take(handshake: Handshake, to: MigrationState) -> None:
    """Takes a new migration m1 of r as far as `to`."""
    handshake.propose(RECORD)
    if to is ABORTED:
        assert handshake.abort("r", "m1", "tired")
        return
    for state, following in _WAY[: [PROPOSED, ACCEPTED, COPYING, COMMITTED].index(to)]:
        handshake.advance("r", "m1", state, following)


def test_from_proposal_to_commit(
    etcd: Etcd, session: Session, handshake: Handshake, keys: Keys
) -> None:
    assert handshake.read("r") is None
    handshake.propose(RECORD)
    assert handshake.read("r") == RECORD
    for state, following in _WAY:
        record = handshake.advance("r", "m1", state, following)
        assert record == handshake.read("r") == replace(RECORD, state=following)
    found = etcd.get(keys.migration("r"))
    assert found is not None and found.lease == session.lease, "every step keeps it on the lease"
    handshake.remove("r", "m1")
    handshake.remove("r", "m1")
    assert handshake.read("r") is None


def test_an_operator_can_read_it(
    etcd_member: EtcdCluster, handshake: Handshake, keys: Keys
) -> None:
    _take(handshake, ABORTED)
    assert etcd_member.ctl("get", keys.migration("r"), "--print-value-only") == (
        '{"request":"r","source":"a-0","destination":"b-1","epoch":3,"state":"aborted",'
        '"reason":"tired","migration":"m1","started":1.5}'
    )


def test_each_migration_has_a_name_of_its_own() -> None:
    one, other = (MigrationRecord("r", "a", "b", 1) for _ in range(2))
    assert one.migration != other.migration
    assert abs(one.started - time.time()) < 5


@pytest.mark.parametrize("request_id", ["a/b", "../leader", "a b\n", "é漢", "%2F", "/", "\0"])
def test_a_request_id_may_have_any_characters(
    handshake: Handshake, keys: Keys, request_id: str
) -> None:
    record = replace(RECORD, request=request_id)
    handshake.propose(record)
    handshake.advance(request_id, "m1", PROPOSED, ACCEPTED)
    assert handshake.read(request_id) == replace(record, state=ACCEPTED)
    key = keys.migration(request_id)
    assert key.isascii() and key.isprintable() and key.count("/") == keys.migration("r").count("/")
    assert keys.parse(key) == Parsed(Kind.MIGRATION, request_id)


def test_two_migrations_of_one_request_collide(handshake: Handshake) -> None:
    _take(handshake, COPYING)
    with pytest.raises(HandshakeError, match="from a-0 to b-1 already, which is copying") as caught:
        handshake.propose(LATER)
    assert caught.value.found == replace(RECORD, state=COPYING)
    with pytest.raises(HandshakeError):
        handshake.propose(RECORD)


def test_no_proposal_without_a_lease(etcd: Etcd, keys: Keys) -> None:
    session = Session(etcd)
    handshake = Handshake(etcd, session, keys)
    for lease in (0, 4711):  # none, and one that has ended without the session's knowing
        session._lease = lease
        with pytest.raises(HandshakeError, match="etcd is not reachable or has ended"):
            handshake.propose(RECORD)
    assert handshake.read("r") is None


def test_it_ends_with_the_proposers_lease(etcd: Etcd, keys: Keys) -> None:
    session = Session(etcd)
    session.start()
    eventually(lambda: session.remaining, within=5)
    handshake = Handshake(etcd, session, keys)
    handshake.propose(RECORD)
    session.stop()
    with pytest.raises(HandshakeError, match="request r is gone, so not accepted") as caught:
        handshake.advance("r", "m1", PROPOSED, ACCEPTED)
    assert caught.value.found is None
    assert not handshake.abort("r", "m1", "")


def test_steps_that_no_migration_takes(handshake: Handshake) -> None:
    taken = {(state, to) for state in MigrationState for to in TRANSITIONS[state]}
    assert taken == {*_WAY, (PROPOSED, ABORTED), (ACCEPTED, ABORTED), (COPYING, ABORTED)}
    handshake.propose(RECORD)
    for state, to in set(product(MigrationState, MigrationState)) - taken:
        with pytest.raises(ValueError, match=f"from {state} to {to}"):
            handshake.advance("r", "m1", state, to)
    assert handshake.read("r") == RECORD


def test_advance_tells_what_it_is_instead(handshake: Handshake) -> None:
    _take(handshake, ABORTED)
    with pytest.raises(HandshakeError, match="request r is aborted, so not committed") as caught:
        handshake.advance("r", "m1", COPYING, COMMITTED)
    assert caught.value.found is not None and caught.value.found.reason == "tired"


@pytest.mark.parametrize("state", MigrationState)
def test_abort(handshake: Handshake, state: MigrationState) -> None:
    _take(handshake, state)
    assert handshake.abort("r", "m1", "second thoughts") is (state is not COMMITTED)
    record = handshake.read("r")
    assert record is not None and record.state is (COMMITTED if state is COMMITTED else ABORTED)
    assert record.reason == {COMMITTED: "", ABORTED: "tired"}.get(state, "second thoughts")


def test_a_late_actor_leaves_the_next_migration_alone(handshake: Handshake) -> None:
    _take(handshake, ABORTED)
    handshake.remove("r", "m1")
    handshake.propose(LATER)
    with pytest.raises(HandshakeError, match="gone"):
        handshake.advance("r", "m1", PROPOSED, ACCEPTED)
    assert not handshake.abort("r", "m1", "late")
    handshake.remove("r", "m1")
    assert handshake.read("r") == LATER


def test_only_one_of_commit_and_abort_succeeds(handshake: Handshake) -> None:
    outcomes = set()
    for _ in range(20):
        _take(handshake, COPYING)
        both = threading.Barrier(2)
        aborted: list[bool] = []

        def abort(both: threading.Barrier = both, aborted: list[bool] = aborted) -> None:
            both.wait()
            aborted.append(handshake.abort("r", "m1", "meanwhile"))

        other = threading.Thread(target=abort)
        other.start()
        both.wait()
        committed = False
        with suppress(HandshakeError):
            committed = handshake.advance("r", "m1", COPYING, COMMITTED).state is COMMITTED
        other.join()
        assert aborted == [not committed]
        record = handshake.read("r")
        assert record is not None and record.state is (COMMITTED if committed else ABORTED)
        outcomes.add(committed)
        handshake.remove("r", "m1")
    print(f"\noutcomes seen: {outcomes}")


class Doubtful(Etcd):
    """Leaves the outcome of its next writes open, and carries them out or not."""

    doubts = 0
    carries_out = True
    afterwards: Callable[[], object] = staticmethod(lambda: None)

    def _swap(self, when, put):  # type: ignore[no-untyped-def]
        if not self.doubts:
            return super()._swap(when, put)
        self.doubts -= 1
        if self.carries_out:
            super()._swap(when, put)
        self.afterwards()
        raise EtcdOutcomeUnknown("nobody answered")


@pytest.fixture
def doubtful(etcd_member: EtcdCluster, closing: Closing) -> Doubtful:
    etcd = Doubtful(etcd_member.endpoints)
    closing(etcd.close)
    return etcd


@pytest.mark.parametrize("carries_out", [True, False])
def test_an_unknown_outcome_is_resolved(
    doubtful: Doubtful, session: Session, keys: Keys, carries_out: bool
) -> None:
    handshake = Handshake(doubtful, session, keys)
    doubtful.carries_out = carries_out
    doubtful.doubts = 1
    handshake.propose(RECORD)
    doubtful.doubts = 1
    assert handshake.advance("r", "m1", PROPOSED, ACCEPTED).state is ACCEPTED
    doubtful.doubts = 1
    assert handshake.abort("r", "m1", "why not")
    assert handshake.read("r") == replace(RECORD, state=ABORTED, reason="why not")
    doubtful.doubts = 1
    with pytest.raises(HandshakeError, match="already"):
        handshake.propose(LATER)


def test_an_unknown_outcome_that_others_went_on_from(
    doubtful: Doubtful, handshake: Handshake, session: Session, keys: Keys
) -> None:
    handshake.propose(RECORD)
    doubtful.afterwards = lambda: handshake.advance("r", "m1", ACCEPTED, COPYING)
    doubtful.doubts = 1
    with pytest.raises(HandshakeError, match="is copying"):
        Handshake(doubtful, session, keys).advance("r", "m1", PROPOSED, ACCEPTED)


def test_an_outcome_that_stays_unknown(
    doubtful: Doubtful, handshake: Handshake, session: Session, keys: Keys
) -> None:
    handshake.propose(RECORD)
    doubtful.doubts = 2
    with pytest.raises(EtcdOutcomeUnknown):
        Handshake(doubtful, session, keys).advance("r", "m1", PROPOSED, ACCEPTED)


def test_a_frozen_members_late_write_changes_nothing(
    three: EtcdCluster, keys: Keys, closing: Closing
) -> None:
    etcd = Etcd(three.endpoints, call_timeout=0.5)
    session = Session(etcd)
    handshake = Handshake(etcd, session, keys)
    closing(etcd.close)
    closing(session.stop)
    session.start()
    eventually(lambda: session.remaining, within=5)
    handshake.propose(RECORD)
    three.freeze(0)
    eventually(lambda: _done(lambda: _advance_all(handshake)), within=8)
    three.thaw(0)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        record = handshake.read("r")
        assert record is not None and record.state is COMMITTED
        time.sleep(0.1)
    handshake.remove("r", "m1")


def test_a_record_that_appears_is_told_once(handshake: Handshake, etcd: Etcd, keys: Keys) -> None:
    """Whoever proposed it knows whether it is one that a frozen member has written too late."""

    def items() -> dict[str, Any]:
        return {kv.key: kv for kv in etcd.get_prefix(keys.prefix)[0]}

    assert handshake.appeared(items()) == []
    handshake.propose(RECORD)
    assert handshake.appeared(items()) == [RECORD]
    handshake.advance("r", "m1", PROPOSED, ACCEPTED)
    assert handshake.appeared(items()) == []
    handshake.remove("r", "m1")
    assert handshake.appeared(items()) == []
    etcd.put(keys.migration("other"), b"{}")  # of another lease, and no record
    assert handshake.appeared(items()) == []


def _advance_all(handshake: Handshake) -> None:
    for state, following in _WAY:
        record = handshake.read("r")
        if record is not None and record.state is state:
            handshake.advance("r", "m1", state, following)


def _done(call: Callable[[], object]) -> bool:
    """False while etcd chooses a new leader."""
    try:
        call()
        return True
    except HandshakeError:
        raise
    except EtcdError:
        return False


def test_no_view_changes_by_it(
    etcd: Etcd, session: Session, handshake: Handshake, keys: Keys, closing: Closing
) -> None:
    registry = Registry(etcd, session, keys)
    views: list[ClusterView] = []
    registry.subscribe(views.append)
    registry.start()
    closing(registry.stop)
    assert registry.wait_view(5)
    told = len(views)
    _take(handshake, COMMITTED)
    handshake.remove("r", "m1")
    revision = etcd.put(keys.drain("x"), b"1")
    eventually(lambda: registry.view.revision >= revision and len(views) > told)
    assert len(views) == told + 1, "only the last of these changes is one of the view"
    assert etcd.delete(keys.drain("x"))


@pytest.mark.parametrize(
    "value", ["", "{}", "[1]", "\xff", '{"request":"r","source":"a","destination":"b","epoch":1}']
)
def test_a_key_that_holds_no_record(
    etcd: Etcd, handshake: Handshake, keys: Keys, value: str
) -> None:
    etcd.put(keys.migration("r"), value.encode("latin-1"))
    for call in (
        lambda: handshake.read("r"),
        lambda: handshake.propose(RECORD),
        lambda: handshake.abort("r", "m1", ""),
    ):
        with pytest.raises(HandshakeError, match="holds no record"):
            call()


_values = st.none() | st.integers(-2, 2) | st.floats() | st.sampled_from(["r", "copying"])
_names = [field.name for field in fields(MigrationRecord)]


@given(st.binary(max_size=30) | st.fixed_dictionaries(dict.fromkeys(_names, _values)))
def test_anything_else_raises_nothing_but_handshake_error(value: bytes | dict[str, Any]) -> None:
    with suppress(HandshakeError):
        _decode(KeyValue("k", value if isinstance(value, bytes) else orjson.dumps(value), 1, 1))
