"""The etcd client: every call goes to one member, and to the next when that one doesn't answer."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llumnix.control.etcd import protobuf
from llumnix.control.etcd.channel import (
    Member,
    TokenExpired,
    Unreachable,
    WatchStream,
    open_member,
    tls_credentials,
)
from llumnix.control.etcd.errors import (
    EtcdError,
    EtcdOutcomeUnknown,
    EtcdRefused,
    EtcdUnavailable,
    LeaseNotFound,
)
from llumnix.control.etcd.types import Compare, Get, KeyValue, Op, Probe, Put, TxnResult

logger = logging.getLogger(__name__)

_MAX_TRIES = 3  # members asked by one call, however many there are


class Etcd:
    """A client of an etcd cluster, usable from any thread.

    `endpoints` are host:port, http://host:port, https://host:port or unix:///path; `ca`, `cert` and
    `key` are paths of PEM files. A call waits `call_timeout` seconds for each member and asks at
    most three, each once. It raises EtcdUnavailable when none answered, EtcdOutcomeUnknown when a
    write may nevertheless have happened, and EtcdRefused when etcd said no. Nothing is connected
    before the first call.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        user: str | None = None,
        password: str | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        call_timeout: float = 1.5,
    ) -> None:
        if not endpoints:
            raise ValueError("at least one etcd endpoint is needed")
        tls = tls_credentials(ca, cert, key)
        self._members = [open_member(endpoint, tls) for endpoint in endpoints]
        self._user, self._password = user, password
        self._call_timeout = call_timeout
        self._lock = threading.Lock()
        self._turn = 0
        self._token = ""
        self._doubtful = False  # whether the token may be what keeps a member from answering

    # reading

    def get(self, key: str) -> KeyValue | None:
        """The key as it is now, or None."""
        response, _ = self._call("range", protobuf.read(key), f"read {key}")
        return protobuf.key_value(response.kvs[0]) if response.kvs else None

    def get_prefix(self, prefix: str, *, at: Member | None = None) -> tuple[list[KeyValue], int]:
        """All keys that begin with `prefix`, and the revision at which that was so.

        With `at`, only that member is asked.
        """
        response, _ = self._call("range", protobuf.read_prefix(prefix), f"list {prefix}", at=at)
        return [protobuf.key_value(kv) for kv in response.kvs], response.header.revision

    # writing

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write the key and return the revision that did it.

        Raises LeaseNotFound when the lease has ended. A write that first went to a member which
        froze is repeated at the next one, and the frozen one may carry it out much later: where
        that matters, use `compare_and_swap`.
        """
        request = protobuf.write(Put(key, value, lease))
        response, _ = self._call("put", request, f"write {key}", writes=True)
        return int(response.header.revision)

    def delete(self, key: str) -> bool:
        """Delete the key; False when there was none (or an unanswered try had deleted it)."""
        response, _ = self._call("delete", protobuf.delete(key), f"delete {key}", writes=True)
        return bool(response.deleted)

    def txn(
        self, when: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()
    ) -> TxnResult:
        """Run `then` if every condition of `when` holds, else `otherwise`, as one step.

        It goes to another member only while it has certainly reached none, so an
        EtcdOutcomeUnknown must be resolved by the caller, who knows what the keys should say.
        """
        return self._txn(when, then, otherwise, repeat=False)[0]

    def put_if_absent(self, key: str, value: bytes, lease: int = 0) -> tuple[bool, KeyValue]:
        """Create the key unless it exists; return whether it is ours, and the key as it is now.

        Raises EtcdOutcomeUnknown when a member may have created it and another found it taken.
        """
        ours, now = self._swap([Compare(key, "create", 0)], Put(key, value, lease))
        assert now is not None, "either branch of the transaction finds the key"
        return ours, now

    def compare_and_swap(
        self, key: str, value: bytes, mod_revision: int, lease: int = 0
    ) -> tuple[bool, KeyValue | None]:
        """Write the key if it still has `mod_revision`; return whether, and the key as it is now.

        Raises EtcdOutcomeUnknown when a member may have written it before another changed it.
        """
        when = [Compare(key, "mod", mod_revision)]
        return self._swap(when, Put(key, value, lease))

    # leases

    def lease_grant(self, ttl: float) -> tuple[int, float]:
        """A new lease: its id, and the seconds it lives, which etcd may have raised."""
        request = protobuf.grant(max(1, round(ttl)))
        response, _ = self._call("grant", request, "grant a lease", writes=True)
        return int(response.ID), float(response.TTL)

    def lease_keepalive_once(self, lease: int) -> float:
        """Prolong the lease; return the seconds it lives from now, 0 when it has ended."""
        response, _ = self._call("keepalive", protobuf.keep_alive(lease), "keep a lease alive")
        return float(response.TTL)

    def lease_revoke(self, lease: int, *, timeout: float | None = None) -> None:
        """End the lease and delete its keys; at ease with a lease that has ended already."""
        request = protobuf.revoke(lease)
        try:
            self._call("revoke", request, "revoke a lease", writes=True, timeout=timeout)
        except LeaseNotFound:
            return

    # watching: all on one member, chosen by the caller, since a proof from another is none

    def current(self) -> Member:
        """The member that calls go to at present."""
        with self._lock:
            return self._members[self._turn]

    def move_on(self, member: Member) -> None:
        """Send calls to the next member from now on, if they went to this one."""
        with self._lock:
            if self._members[self._turn] is member:
                self._turn = (self._turn + 1) % len(self._members)

    def watch(self, prefix: str, revision: int, at: Member) -> WatchStream:
        """The changes under `prefix` from `revision` on, as that member tells them."""
        return at.watch(protobuf.watch_prefix(prefix, revision), self._token)

    def probe(
        self, prefix: str, at: Member, timeout: float, answer: Callable[[Probe | EtcdError], None]
    ) -> None:
        """Ask that member what the prefix looks like; it answers only if it has a quorum."""
        at.probe(protobuf.read_newest(prefix), timeout, self._token, answer)

    def close(self) -> None:
        """Close every connection; calls still under way raise EtcdUnavailable."""
        for member in self._members:
            member.close()

    # the pass over the members

    def _call(
        self,
        method: str,
        request: Any,
        what: str,
        *,
        at: Member | None = None,
        writes: bool = False,
        repeat: bool = True,
        timeout: float | None = None,
    ) -> tuple[Any, bool]:
        """Return the answer, and whether an earlier try may have been carried out as well."""
        budget = self._call_timeout * _MAX_TRIES if timeout is None else timeout
        deadline = time.monotonic() + budget
        tried: list[str] = []
        unsure = False
        for member in [at] if at else self._in_turn():
            left = deadline - time.monotonic()
            if left <= 0 or (unsure and not repeat):
                break
            try:
                share = min(left, self._call_timeout)
                return self._authorised(member, method, request, share), unsure
            except Unreachable as error:
                tried.append(f"{member.endpoint} ({error})")
                unsure = unsure or (writes and error.sent)
                # A token names a revision, which a member waits for. After a wipe it waits long.
                self._doubtful = self._doubtful or error.sent
                self.move_on(member)
        sentence = f"no etcd member answered the request to {what}: {', '.join(tried)}"
        raise EtcdOutcomeUnknown(sentence) if unsure else EtcdUnavailable(sentence)

    def _in_turn(self) -> Iterator[Member]:
        with self._lock:
            first = self._turn
        for step in range(min(len(self._members), _MAX_TRIES)):
            yield self._members[(first + step) % len(self._members)]

    def _authorised(self, member: Member, method: str, request: Any, timeout: float) -> Any:
        deadline = time.monotonic() + timeout

        def left() -> float:
            return max(0.01, deadline - time.monotonic())

        if self._user is not None and (self._doubtful or not self._token):
            self._authenticate(member, timeout)
        try:
            return member.call(method, request, left(), self._token)
        except TokenExpired as error:
            if self._user is None:
                raise EtcdRefused(f"etcd wants a user and a password: {error}") from None
        self._authenticate(member, left())
        try:
            return member.call(method, request, left(), self._token)
        except TokenExpired as error:
            raise EtcdRefused(f"etcd does not accept its own token: {error}") from None

    def _authenticate(self, member: Member, timeout: float) -> None:
        request = protobuf.authenticate(self._user or "", self._password or "")
        try:
            self._token = member.call("authenticate", request, timeout, "").token
        except EtcdRefused as error:
            if "authentication is not enabled" not in str(error):
                raise
            self._token = ""
            logger.debug("etcd wants no authentication, so the user and password go unused.")
        self._doubtful = False

    def _txn(
        self, when: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op], repeat: bool
    ) -> tuple[TxnResult, bool]:
        request = protobuf.transaction(when, then, otherwise)
        what = f"change {when[0].key if when else then[0].key}"
        response, unsure = self._call("txn", request, what, writes=True, repeat=repeat)
        return protobuf.txn_result(response), unsure

    def _swap(self, when: Sequence[Compare], put: Put) -> tuple[bool, KeyValue | None]:
        # Safe to repeat: whichever try is carried out first makes the condition false for the rest.
        read = Get(put.key)
        result, unsure = self._txn(when, [put, read], [read], repeat=True)
        now = result.found[-1]
        ours = result.succeeded
        if unsure and not ours:
            ours = now is not None and (now.value, now.lease) == (put.value, put.lease)
            if not ours:
                raise EtcdOutcomeUnknown(
                    f"{put.key} was changed while a member did not answer the request to write it"
                )
        return ours, now
