"""A prefix of etcd, mirrored: listed, then watched, and listed again when the watch is in doubt."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from llumnix.backoff import Backoff
from llumnix.control.etcd.channel import Member
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdError, WatchEnded
from llumnix.control.etcd.heartbeat import Pulse
from llumnix.control.etcd.types import KeyValue, WatchBatch
from llumnix.control.etcd.watch_stream import Feed, Proof

logger = logging.getLogger(__name__)

OnChange = Callable[[Mapping[str, KeyValue], int, Collection[str] | None], None]

_GAP = 0.005  # seconds between deliveries, so that a storm of changes costs a bounded share of CPU


class PrefixWatch:
    """Keeps a copy of all keys under `prefix` and tells `on_change` of each new one.

    A watch of etcd stays silent when its member freezes or loses its peers. So every
    `probe_interval` seconds the same member is asked for a read that takes a quorum, which must
    also agree with what the watch delivered; if it doesn't, everything is listed again on the next
    member. While no member answers, the last copy stays, and at most `longest_pause` seconds pass
    between two tries.

    `on_change(items, revision, deleted)` runs on this object's thread: after each list, also one
    that is as the copy was, since leases may end behind it that nobody could prolong before; and
    after each batch of changes, of which several may come as one. `deleted` are the keys that the
    batch deletes; after a list it is None, as a list can't tell what has been deleted from what has
    been lost. `on_proof()` runs there whenever etcd has confirmed the copy. Neither may block.
    """

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        on_change: OnChange,
        on_proof: Callable[[], None] = lambda: None,
        *,
        probe_interval: float = 0.7,
        longest_pause: float = 2.0,
    ) -> None:
        self.pulse = Pulse("the watch")
        self._etcd = etcd
        self._prefix = prefix
        self._on_change = on_change
        self._on_proof = on_proof
        self._interval = probe_interval
        self._items: Mapping[str, KeyValue] = {}
        self._revision = 0
        self._proven = float("-inf")
        self._feed: Feed | None = None
        self._in_doubt = False
        self._backoff = Backoff(longest=longest_pause)
        self._lost_sight = False
        self._static_since: float | None = None  # when it was found that etcd is silent
        self._listed = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {prefix}", daemon=True)

    @property
    def age(self) -> float:
        """Seconds since the copy was last proven current; infinite before the first list."""
        return time.monotonic() - self._proven

    @property
    def alive(self) -> bool:
        """Whether the copy is current, give or take the seconds that it takes to notice."""
        return self.age < 2 * self._interval + 1.0

    def start(self) -> None:
        """Begin to mirror; returns at once."""
        self._thread.start()

    def wait_listed(self, within: float) -> bool:
        """Wait for the first list, at most `within` seconds; whether there was one."""
        return self._listed.wait(within)

    def stop(self) -> None:
        """End the thread; `on_change` is not called again once this has returned."""
        self._stopping.set()
        if self._feed is not None:
            self._feed.wake()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.pulse.beat()
            member = self._etcd.current()
            try:
                self._follow(member)
            except EtcdError as error:
                self._etcd.move_on(member)
                self._tell(member, error)
                self.pulse.beat()
                self._stopping.wait(self._backoff.delay())

    def _tell(self, member: Member, error: EtcdError) -> None:
        if self.alive or not self._lost_sight:  # once for each outage
            logger.info(
                "The watch of %s on %s broke off (%s), so it starts over on the next member.",
                self._prefix,
                member.endpoint,
                error,
            )
        self._lost_sight = not self.alive
        if self._lost_sight and self._static_since is None and self._listed.is_set():
            self._static_since = self._proven
            logger.warning(
                "etcd is silent, so this node goes on with its view of revision %d.", self._revision
            )

    def _follow(self, member: Member) -> None:
        """List, then watch, on one member; returns when told to stop, raises when in doubt."""
        asked = time.monotonic()
        listed, revision = self._etcd.get_prefix(self._prefix, at=member)
        self.pulse.beat()
        if self._static_since is not None:
            logger.info("etcd answers again, after %.1f s.", asked - self._static_since)
            self._static_since = None
        self._replace(listed, revision)
        self._proven = asked
        self._listed.set()
        self._in_doubt = False
        feed = self._feed = Feed(
            *(self._etcd, member, self._prefix, revision + 1, self._interval),
            on_ask=self.pulse.beat,
        )
        try:
            feed.start()
            while not self._stopping.is_set():
                self.pulse.beat()
                news = feed.next()
                self.pulse.beat()
                if isinstance(news, Proof):
                    self._judge(news)
                elif news is not None:
                    self._apply(news, feed)
        finally:
            feed.stop()

    def _replace(self, listed: list[KeyValue], revision: int) -> None:
        old = self._items
        # Keys that are as they were stay the same objects, so that readers see what changed.
        items = {kv.key: was if (was := old.get(kv.key)) == kv else kv for kv in listed}
        if revision < self._revision:
            logger.warning(
                "etcd went back from revision %d to %d: its data was wiped or restored.",
                self._revision,
                revision,
            )
        self._items, self._revision = items, revision
        self._deliver(None)

    def _apply(self, batch: WatchBatch, feed: Feed) -> None:
        items = dict(self._items)
        deleted: set[str] = set()
        more: WatchBatch | None = batch
        while more is not None:
            for key, kv in more.changes:
                if kv is None:
                    items.pop(key, None)
                    deleted.add(key)
                else:
                    items[key] = kv
            batch, more = more, feed.next_at_once()
        self._items, self._revision = items, batch.revision
        self._in_doubt = False
        self._deliver(deleted)
        self._stopping.wait(_GAP)

    def _judge(self, proof: Proof) -> None:
        """Check that the mirror agrees with the probe, or catches up before the next one."""
        probe = proof.probe
        if probe.newest <= self._revision and probe.count == len(self._items):
            self._in_doubt = False
            self._proven = proof.asked
            self._backoff.reset()
            self._call(self._on_proof)
        elif self._in_doubt:
            raise WatchEnded("the watch delivers less than the member holds")
        else:
            self._in_doubt = True

    def _deliver(self, deleted: Collection[str] | None) -> None:
        items = MappingProxyType(self._items)
        self._call(lambda: self._on_change(items, self._revision, deleted))

    def _call(self, reader: Callable[[], None]) -> None:
        if self._stopping.is_set():
            return
        try:
            reader()
        except Exception:
            # A reader's fault must not end the mirror for all other readers.
            logger.exception("A reader of %s failed on revision %d.", self._prefix, self._revision)
