"""The node's lease, and the keys that live by it."""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Literal

from llumnix.backoff import Backoff
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdError, EtcdUnavailable, LeaseNotFound
from llumnix.control.etcd.heartbeat import Pulse
from llumnix.control.etcd.lease_keys import Judge, OwnedKeys
from llumnix.control.etcd.types import KeyValue

logger = logging.getLogger(__name__)


class Session:
    """Holds one lease and writes the keys put here with it, again whenever the lease is a new one.

    `put` and `remove` return at once; a thread of this object does the writing, and the latest
    value wins. `ttl` is in seconds; etcd raises it to its minimum (about 2).
    """

    def __init__(self, etcd: Etcd, ttl: float = 6.0) -> None:
        self.pulse = Pulse("the session")
        self._etcd = etcd
        self._ttl = ttl
        # The last answer about the lease, which is logged. Only etcd's own word makes it lost.
        self._state: Literal["held", "lost", "unknown"] = "unknown"
        self._lease = 0
        self._deadline = float("-inf")  # until then the lease is certainly held
        self._due = float("-inf")  # when to prolong it
        self._owned = OwnedKeys()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._backoff = Backoff(0.1, ttl / 6)
        self._complaint = ""
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)

    @property
    def lease(self) -> int:
        """The lease's id; 0 while there is none."""
        return self._lease

    @property
    def remaining(self) -> float:
        """Seconds for which the lease is certainly held; 0 when that can't be said."""
        return max(0.0, self._deadline - time.monotonic())

    def start(self) -> None:
        """Begin to hold a lease; returns at once."""
        self._thread.start()

    def put(self, key: str, value: bytes) -> None:
        """Keep the key at `value` for as long as this session lives."""
        self._owned.put(key, value)
        self._wake.set()

    def remove(self, key: str) -> None:
        """Delete a key that was put here; does nothing for any other."""
        self._owned.remove(key)
        self._wake.set()

    def keep(self, key: str, value: bytes, is_wrong: Judge = lambda found: False) -> None:
        """Put the key back, without the lease, whenever `observe` is shown that it is missing.

        Also when it has another value which `is_wrong`, a function of it that is quick.
        """
        self._owned.keep(key, value, is_wrong)

    def observe(self, items: Mapping[str, KeyValue], revision: int) -> None:
        """Compare a snapshot that is complete up to `revision` with what was written.

        A key that somebody deleted or overwrote is written again. That somebody may be we: a member
        that was frozen carries out, when it thaws, a write that was long since repeated elsewhere.
        """
        if self._owned.disturbed(items, revision, self._lease):
            self._wake.set()

    def stop(self, within: float = 2.0) -> None:
        """End the thread and the lease, and with it all keys; gives up after `within` seconds.

        The lease then ends by itself, after its time to live. A call that is under way comes on
        top, a few seconds when no member answers.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        lease, self._lease, self._deadline = self._lease, 0, float("-inf")
        if lease:
            try:
                self._etcd.lease_revoke(lease, timeout=within)
            except EtcdError as error:
                logger.warning(
                    "The lease could not be revoked and will run out by itself: %s.", error
                )

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            self.pulse.beat()
            try:
                self._beat()
            except LeaseNotFound:
                self._lose()
            except EtcdUnavailable as error:
                self._due = float("-inf")  # so that the next beat begins with the lease
                self._enter("unknown", str(error))
            except EtcdError as error:
                self._complain(str(error))
            else:
                self._backoff.reset()
                self.pulse.beat()
                self._wake.wait(max(0.0, self._due - time.monotonic()))
                continue
            self.pulse.beat()
            self._stopping.wait(self._backoff.delay())

    def _beat(self) -> None:
        """Do what is due: have a lease, prolong it, write and delete what is not yet."""
        self._keep_lease()
        self.pulse.beat()
        while not self._stopping.is_set() and self._owned.settle_one(self._etcd, self._lease):
            self.pulse.beat()
            self._keep_lease()
            self.pulse.beat()

    def _keep_lease(self) -> None:
        asked = time.monotonic()
        if not self._lease:
            self._lease, ttl = self._etcd.lease_grant(self._ttl)
        elif asked >= self._due:
            ttl = self._etcd.lease_keepalive_once(self._lease)
            if ttl <= 0:
                raise LeaseNotFound("the lease has ended")
        else:
            return
        self._deadline, self._due = asked + ttl, asked + interval_of(min(self._ttl, ttl))
        self._enter("held", f"for {ttl:.0f} s from now")

    def _lose(self) -> None:
        self._lease = 0
        self._deadline = float("-inf")
        self._owned.forget_written()
        self._enter("lost", "so a new one is asked for and all keys are written again")

    def _enter(self, state: Literal["held", "lost", "unknown"], why: str) -> None:
        if state != self._state:
            logger.info("The lease is %s: %s.", state, why)
        self._state = state

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            logger.warning("etcd refuses what the session asks, which it repeats: %s.", complaint)
        self._complaint = complaint


def interval_of(ttl: float) -> float:
    """Seconds between two keep-alives of a lease that lives `ttl` seconds."""
    return ttl / 3


def fitting_timeout(ttl: float, timeout: float) -> float:
    """The seconds that a call may wait for a member: `timeout`, or less where that is too long.

    A keep-alive must be able to fail at one member and succeed at the next before the lease ends:
    interval + 2 * timeout <= ttl.
    """
    longest = (ttl - interval_of(ttl)) / 2
    if timeout <= longest:
        return timeout
    logger.warning(
        "An etcd timeout of %.2f s is too long for a lease of %.1f s, as a keep-alive every "
        "%.1f s must be able to fail once, so it is %.2f s.",
        timeout,
        ttl,
        interval_of(ttl),
        longest,
    )
    return longest
