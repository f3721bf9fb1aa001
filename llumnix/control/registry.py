"""Who is in the cluster and how loaded they are: this node's announcements, and the view of all."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceLoad, NodeId, NodeInfo
from llumnix.control.codec import encode_instance, encode_node
from llumnix.control.desired import Wish, put_desired
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.heartbeat import Pulse
from llumnix.control.etcd.session import Session
from llumnix.control.etcd.types import KeyValue
from llumnix.control.etcd.watch import PrefixWatch
from llumnix.control.grace_period import Grace
from llumnix.control.keys import Keys, Kind
from llumnix.control.load_publisher import LoadPublisher
from llumnix.control.local_overlay import Ahead
from llumnix.control.view import ViewBuilder
from llumnix.control.view_changes import changes

logger = logging.getLogger(__name__)


class Registry:
    """Membership and load. Announcing never blocks and never fails: the session writes it.

    `view` is the last snapshot, which stays while etcd is unreachable. Nodes and instances that are
    missing when etcd is back stay in it for `grace` seconds (see Grace). Its owner starts
    and stops the session; what was announced vanishes with it.
    """

    def __init__(self, etcd: Etcd, session: Session, keys: Keys, *, grace: float = 6.0) -> None:
        self._etcd = etcd
        self._session = session
        self._keys = keys
        self._builder = ViewBuilder(keys)
        self._watch = PrefixWatch(
            *(etcd, keys.prefix, self._on_change, self._on_proof),
            # All are to see etcd again, and what it has lost of theirs, well within the grace.
            longest_pause=min(2.0, grace / 6),
        )
        self._grace = Grace(grace, self._is_member)
        self._grace_seconds = grace
        self._revision = 0
        self._publisher = LoadPublisher(self._write_loads)
        self._node: NodeId | None = None
        self._listed = self._view = ClusterView()  # as etcd has it; and with what is to come
        self._ahead = Ahead()
        self._lock = threading.Lock()
        self._showing = threading.RLock()  # views reach the subscribers one after the other
        self._subscribers: tuple[Callable[[ClusterView], None], ...] = ()
        # Called with all keys whenever one has changed, on the watch's thread; must not block.
        self.on_keys: Callable[[Mapping[str, KeyValue]], None] = lambda items: None

    @property
    def view(self) -> ClusterView:
        """The cluster as last seen; empty until the first list."""
        return self._view

    @property
    def age(self) -> float:
        """Seconds since the view was last proven current; infinite before the first list."""
        return self._watch.age

    @property
    def alive(self) -> bool:
        """Whether the view is current; False when it is what is left from before an outage."""
        return self._watch.alive

    @property
    def pulse(self) -> Pulse:
        """The heartbeat of the watch's thread."""
        return self._watch.pulse

    def start(self) -> None:
        """Begin to watch; returns at once."""
        self._publisher.start()
        self._watch.start()

    def wait_view(self, within: float) -> bool:
        """Wait for the first view, at most `within` seconds; whether there is one."""
        return self._watch.wait_listed(within)

    def stop(self) -> None:
        """End the threads; once this has returned, only announcements call subscribers."""
        self._publisher.stop()
        self._watch.stop()

    def subscribe(self, callback: Callable[[ClusterView], None]) -> None:
        """Have `callback` called with each new view; it must not block.

        That is on the watch's thread, or on that of an announcement of an instance, never on two at
        the same time.

        It is called too when something has come and gone between two views that look the same.
        """
        with self._lock:
            self._subscribers = (*self._subscribers, callback)

    def announce_node(self, node: NodeInfo) -> None:
        """Make this node known; call it before `report_loads`."""
        self._node = node.id
        self._session.put(self._keys.node(node.id), encode_node(node))

    def announce_instance(self, instance: InstanceInfo) -> None:
        """Make an instance of this node known, or its new state; to this node at once."""
        self._session.put(self._keys.instance(instance.id), encode_instance(instance))
        self._ahead.announce(instance)
        self._show_own()

    def withdraw_instance(self, instance: InstanceId) -> None:
        """Take an announced instance out of the cluster."""
        self._session.remove(self._keys.instance(instance))
        self._ahead.withdraw(instance)
        self._show_own()

    def report_loads(self, loads: Sequence[InstanceLoad]) -> None:
        """Report this node's loads, all of them; written on change, at most 5 times a second.

        Raises RuntimeError before `announce_node`.
        """
        if self._node is None:
            raise RuntimeError("a node announces itself before it reports loads")
        self._publisher.report(loads)

    def put_drain(self, name: str) -> None:
        """Drain a node or an instance until `delete_drain`. Blocks; raises EtcdError."""
        self._etcd.put(self._keys.drain(name), b"{}")

    def delete_drain(self, name: str) -> None:
        """End the drain of a node or an instance. Blocks; raises EtcdError."""
        self._etcd.delete(self._keys.drain(name))

    def put_desired(self, wish: Wish) -> None:
        """Write the numbers of instances that this leader wants. Blocks; raises EtcdError."""
        put_desired(self._etcd, self._keys, wish)

    def _write_loads(self, value: bytes) -> None:
        assert self._node is not None
        self._session.put(self._keys.load(self._node), value)

    def _is_member(self, key: str) -> bool:
        parsed = self._keys.parse(key)
        return parsed is not None and parsed.kind in (Kind.NODE, Kind.INSTANCE, Kind.LOAD)

    def _on_change(
        self, items: Mapping[str, KeyValue], revision: int, deleted: Collection[str] | None
    ) -> None:
        self._session.observe(items, revision)
        self.on_keys(items)
        self._revision = revision
        before = set(self._grace.kept)
        if deleted is None:
            shown = self._grace.after_list(items, time.monotonic())
        else:
            shown = self._grace.after_events(items, deleted, time.monotonic())
        self._tell_grace(before)
        self._show(shown, deleted)

    def _on_proof(self) -> None:
        if self._grace.is_over(time.monotonic()):
            self._say("%s did not come back within %.1f s, so they are gone.", self._grace.kept)
            self._show(self._grace.end(), ())

    def _tell_grace(self, before: Collection[str]) -> None:
        kept = set(self._grace.kept)
        if kept - set(before):
            self._say("etcd lacks %s, which stay in the view for %.1f s, to come back.", kept)
        elif before and not kept:
            logger.info("All that etcd lacked is back, or was deleted.")

    def _say(self, sentence: str, keys: Collection[str]) -> None:
        names = ", ".join(key.removeprefix(self._keys.prefix) for key in sorted(keys))
        logger.warning(sentence, names, self._grace_seconds)

    def _show(self, items: Mapping[str, KeyValue], deleted: Collection[str] | None) -> None:
        """Show these keys; after a list, what was deleted is not known, and much may have been."""
        with self._showing:
            self._listed = self._builder.build(items, self._revision, deleted or ())
            self._publish(told=deleted is None or self._builder.changed)

    def _show_own(self) -> None:
        """Show what this node has just announced."""
        with self._showing:
            self._publish(told=True)

    def _publish(self, told: bool) -> None:
        """Make the view that of now, and tell the subscribers if they are to be told."""
        old = self._view
        self._view = view = self._ahead.of(self._listed)
        if not told:
            return
        for sentence in changes(old, view):
            logger.info("%s", sentence)
        for subscriber in self._subscribers:
            try:
                subscriber(view)
            except Exception:
                # One subscriber's fault must not hide the view from the others.
                logger.exception("A subscriber failed on the view of revision %d.", view.revision)
