"""The record of a live migration in etcd, which both of its ends and the leader go by."""

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import NamedTuple, TypeVar

import msgspec
import orjson

from llumnix.cluster import InstanceId
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import (
    EtcdError,
    EtcdOutcomeUnknown,
    EtcdUnavailable,
    LeaseNotFound,
)
from llumnix.control.etcd.session import Session
from llumnix.control.etcd.types import Compare, Delete, Get, KeyValue, Put
from llumnix.control.keys import Keys, Kind

T = TypeVar("T")


class MigrationState(StrEnum):
    """How far a migration is. COMMITTED is the one point at which the request changes hands."""

    PROPOSED = "proposed"
    ACCEPTED = "accepted"
    COPYING = "copying"
    COMMITTED = "committed"
    ABORTED = "aborted"


TRANSITIONS: Mapping[MigrationState, frozenset[MigrationState]] = {
    MigrationState.PROPOSED: frozenset({MigrationState.ACCEPTED, MigrationState.ABORTED}),
    MigrationState.ACCEPTED: frozenset({MigrationState.COPYING, MigrationState.ABORTED}),
    MigrationState.COPYING: frozenset({MigrationState.COMMITTED, MigrationState.ABORTED}),
    MigrationState.COMMITTED: frozenset(),
    MigrationState.ABORTED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """One migration of one request; the key's value is this as JSON.

    `migration` is this migration's own name: whoever still works at an earlier one of the same
    request must not touch this record. `started` is in seconds since 1970, for operators only.
    """

    request: str
    source: InstanceId
    destination: InstanceId
    epoch: int  # of the request, while the source owns it
    state: MigrationState = MigrationState.PROPOSED
    reason: str = ""  # why it was proposed or, once aborted, why that
    migration: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=lambda: round(time.time(), 3))


class HandshakeError(EtcdError):
    """The record does not allow what was asked; `found` is what it is now, None if it is gone."""

    def __init__(self, sentence: str, found: MigrationRecord | None = None) -> None:
        super().__init__(sentence)
        self.found = found


class Handshake:
    """Reads and changes the records of migrations; any thread may call, and every call blocks.

    A record exists from `propose` to `remove`, at most as long as the lease of the node that
    proposed it, so what is gone was not necessarily aborted: who needs to know asks the other end.
    Nothing is ever written without a condition, as a member that was frozen may carry out a write
    long after it was repeated elsewhere. A write whose outcome is unknown is repeated once, which
    tells what became of it; so a call lasts at most two rounds of the etcd client's.

    Every call raises EtcdUnavailable when etcd doesn't answer, the writing ones EtcdOutcomeUnknown
    when it may nevertheless have happened, and HandshakeError for a key that holds no record.
    """

    def __init__(self, etcd: Etcd, session: Session, keys: Keys) -> None:
        self._etcd = etcd
        self._session = session
        self._keys = keys
        self._below = f"{keys.prefix}{Kind.MIGRATION}/"
        self._seen: Mapping[str, KeyValue] = {}
        # By migration, what was proposed here: so the key need not be read before each step.
        self._proposed: dict[str, tuple[MigrationRecord, KeyValue]] = {}

    def read(self, request: str) -> MigrationRecord | None:
        """The migration of the request that is under way or not yet removed."""
        kv = self._etcd.get(self._keys.migration(request))
        return None if kv is None else _decode(kv)

    def propose(self, record: MigrationRecord) -> None:
        """Writes a new record, which lives as long as this node's lease.

        Raises HandshakeError while there is a record of any migration of the request, whatever its
        state, and while this node has no lease.
        """
        lease = self._session.lease
        if not lease:
            raise HandshakeError(_NO_LEASE)
        key, value = self._keys.migration(record.request), orjson.dumps(record)
        try:
            (ours, now), repeated = _insist(lambda: self._etcd.put_if_absent(key, value, lease))
        except LeaseNotFound:
            raise HandshakeError(_NO_LEASE) from None
        if not ours and not (repeated and now.value == value):
            other = _decode(now)
            raise HandshakeError(
                f"request {record.request} has a migration from {other.source} to "
                f"{other.destination} already, which is {other.state}",
                other,
            )
        self._proposed[record.migration] = record, now

    def advance(
        self, request: str, migration: str, expected: MigrationState, to: MigrationState
    ) -> MigrationRecord:
        """Takes the migration from `expected` to `to` and returns the new record.

        Raises HandshakeError when it is not in that state (any more), or gone, and ValueError for a
        step that no migration may take.
        """
        if to not in TRANSITIONS[expected]:
            raise ValueError(f"no migration goes from {expected} to {to}")
        if (done := self._step(migration, expected, to)) is not None:
            return done
        now = self._find(request, migration)
        if now is not None and now.record.state is expected:
            done, now = self._swap(now, replace(now.record, state=to))
            if done is not None:
                return done
        found, state = (None, "gone") if now is None else (now.record, now.record.state.value)
        raise HandshakeError(f"the migration of request {request} is {state}, so not {to}", found)

    def abort(self, request: str, migration: str, reason: str) -> bool:
        """Takes the migration to ABORTED from wherever it is; False if it is committed or gone."""
        now = self._find(request, migration)
        # Each round that fails finds the migration further on, so there are few.
        while now is not None and now.record.state is not MigrationState.ABORTED:
            if MigrationState.ABORTED not in TRANSITIONS[now.record.state]:
                return False
            aborted = replace(now.record, state=MigrationState.ABORTED, reason=reason)
            done, now = self._swap(now, aborted)
            if done is not None:
                return True
        return now is not None

    def remove(self, request: str, migration: str) -> None:
        """Deletes the record, in whatever state; does nothing if that migration's is gone."""
        _, kv = self._proposed.pop(migration, (None, None))
        if kv is None:
            now = self._find(request, migration)
            kv = None if now is None else now.kv
        if kv is not None:
            # The record of another migration would be another creation of the key.
            when = [Compare(kv.key, "create", kv.create_revision)]
            then = [Delete(kv.key)]
            _insist(lambda: self._etcd.txn(when, then))

    def appeared(self, items: Mapping[str, KeyValue]) -> list[MigrationRecord]:
        """Of all keys: the records that live by this node's lease and were not there last time.

        A member that was frozen may write a proposal long after its migration has ended, which only
        the proposer can know. For one thread; asks etcd nothing.
        """
        seen, self._seen = self._seen, {k: v for k, v in items.items() if k.startswith(self._below)}
        lease = self._session.lease
        new = [kv for key, kv in self._seen.items() if kv.lease == lease and key not in seen]
        records = []
        for kv in new:
            with contextlib.suppress(HandshakeError):
                records.append(_decode(kv))
        return records

    def _step(
        self, migration: str, expected: MigrationState, to: MigrationState
    ) -> MigrationRecord | None:
        """A step of what was proposed here, if its record is as expected; else None.

        What is expected is known to the byte, so the key is written without being read.
        """
        record, kv = self._proposed.get(migration, (None, None))
        if record is None or kv is None:
            return None
        was, becomes = (orjson.dumps(replace(record, state=state)) for state in (expected, to))
        when, then = [Compare(kv.key, "value", was)], [Put(kv.key, becomes, kv.lease)]
        result, repeated = _insist(lambda: self._etcd.txn(when, then, [Get(kv.key)]))
        now = None if result.succeeded else result.found[0]
        if result.succeeded or (repeated and now is not None and now.value == becomes):
            return replace(record, state=to)
        return None

    def _find(self, request: str, migration: str) -> "_Found | None":
        kv = self._etcd.get(self._keys.migration(request))
        return _entry(kv, migration)

    def _swap(
        self, was: "_Found", record: MigrationRecord
    ) -> tuple[MigrationRecord | None, "_Found | None"]:
        """Writes `record` in place of what was found; returns it, or None and what is there now."""
        kv, value = was.kv, orjson.dumps(record)
        (ours, now), repeated = _insist(
            lambda: self._etcd.compare_and_swap(kv.key, value, kv.mod_revision, kv.lease)
        )
        if ours or (repeated and now is not None and now.value == value):
            return record, None
        return None, _entry(now, record.migration)


class _Found(NamedTuple):
    """A record, and the key that it was read from."""

    kv: KeyValue
    record: MigrationRecord


_FIELDS = {field.name for field in fields(MigrationRecord)}
_NO_LEASE = "etcd is not reachable or has ended this node's lease, so no migration can be proposed"


def _insist(write: Callable[[], T]) -> tuple[T, bool]:
    """Makes a write, and again if its outcome is unknown; returns the answer, and whether again.

    For writes whose condition lets one of the two happen at most.
    """
    try:
        return write(), False
    except EtcdOutcomeUnknown as unknown:
        try:
            return write(), True
        except EtcdUnavailable:
            raise unknown from None


def _entry(kv: KeyValue | None, migration: str) -> _Found | None:
    """None also for the record of another migration."""
    if kv is None:
        return None
    record = _decode(kv)
    return _Found(kv, record) if record.migration == migration else None


def _decode(kv: KeyValue) -> MigrationRecord:
    try:
        data = orjson.loads(kv.value)
        if not isinstance(data, dict) or not data.keys() >= _FIELDS:
            raise ValueError("it lacks some of the fields")
        record: MigrationRecord = msgspec.convert(data, MigrationRecord)
    except (ValueError, msgspec.ValidationError) as error:
        raise HandshakeError(f"{kv.key} holds no record of a migration: {error}") from None
    return record
