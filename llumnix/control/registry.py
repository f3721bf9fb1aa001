"""Who is in the cluster and how loaded they are: this node's announcements, and the view of all."""

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceLoad, NodeId, NodeInfo
from llumnix.control.codec import encode_instance, encode_loads, encode_node
from llumnix.control.desired import Wish, put_desired
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.heartbeat import Pulse
from llumnix.control.etcd.session import Session
from llumnix.control.etcd.types import KeyValue
from llumnix.control.etcd.watch import PrefixWatch
from llumnix.control.keys import Keys, Kind
from llumnix.control.view import Grace, ViewBuilder, changes

logger = logging.getLogger(__name__)

REPORT_INTERVAL = 0.2  # seconds between two reports of loads
REPORT_SETTLE = 0.005  # seconds from a change of a load to the report of it, at the least


class Registry:
    """Membership and load. Announcing never blocks and never fails: the session writes it.

    `view` is the last snapshot, which stays while etcd is unreachable. Nodes and instances that are
    missing when etcd is back stay in it for `grace` seconds (see Grace). Its owner starts
    and stops the session; what was announced vanishes with it.
    """

    def __init__(
        self,
        etcd: Etcd,
        session: Session,
        keys: Keys,
        *,
        grace: float = 6.0,
        on_keys: Callable[[Mapping[str, KeyValue]], None] = lambda items: None,
    ) -> None:
        """`on_keys`: called with all keys whenever one has changed, on the watch's thread; must not
        block."""
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
        self._node: NodeId | None = None
        self._listed = self._view = ClusterView()  # as etcd has it; and with what is to come
        # Of this node's instances, what no view of etcd has shown yet; None: withdrawn.
        self._pending: dict[InstanceId, InstanceInfo | None] = {}
        self._showing = threading.RLock()  # views reach the subscribers one after the other
        self._subscribers: tuple[Callable[[ClusterView], None], ...] = ()
        self._on_keys = on_keys

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
        self._watch.start()

    def wait_view(self, within: float) -> bool:
        """Wait for the first view, at most `within` seconds; whether there is one."""
        return self._watch.wait_listed(within)

    def stop(self) -> None:
        """End the thread; once this has returned, only announcements call subscribers."""
        self._watch.stop()

    def subscribe(self, callback: Callable[[ClusterView], None]) -> None:
        """Have `callback` called with each new view; it must not block.

        That is on the watch's thread, or on that of an announcement of an instance, never on two at
        the same time.

        It is called too when something has come and gone between two views that look the same.
        """
        with self._showing:
            self._subscribers = (*self._subscribers, callback)

    def announce_node(self, node: NodeInfo) -> None:
        """Make this node known; call it before `report_loads`."""
        self._node = node.id
        self._session.put(self._keys.node(node.id), encode_node(node))

    def announce_instance(self, instance: InstanceInfo) -> None:
        """Make an instance of this node known, or its new state; to this node at once."""
        self._session.put(self._keys.instance(instance.id), encode_instance(instance))
        self._show_own(instance.id, instance)

    def withdraw_instance(self, instance: InstanceId) -> None:
        """Take an announced instance out of the cluster."""
        self._session.remove(self._keys.instance(instance))
        self._show_own(instance, None)

    def report_loads(self, loads: Sequence[InstanceLoad]) -> None:
        """Report this node's loads, all of them; written if they have changed.

        Raises RuntimeError before `announce_node`.
        """
        if self._node is None:
            raise RuntimeError("a node announces itself before it reports loads")
        self._session.put(self._keys.load(self._node), encode_loads(loads))

    def put_drain(self, name: str) -> None:
        """Drain a node or an instance until `delete_drain`. Blocks; raises EtcdError."""
        self._etcd.put(self._keys.drain(name), b"{}")

    def delete_drain(self, name: str) -> None:
        """End the drain of a node or an instance. Blocks; raises EtcdError."""
        self._etcd.delete(self._keys.drain(name))

    def put_desired(self, wish: Wish) -> None:
        """Write the numbers of instances that this leader wants. Blocks; raises EtcdError."""
        put_desired(self._etcd, self._keys, wish)

    def _is_member(self, key: str) -> bool:
        parsed = self._keys.parse(key)
        return parsed is not None and parsed.kind in (Kind.NODE, Kind.INSTANCE, Kind.LOAD)

    def _on_change(
        self, items: Mapping[str, KeyValue], revision: int, deleted: Collection[str] | None
    ) -> None:
        self._session.observe(items, revision)
        self._on_keys(items)
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

    def _show_own(self, instance: InstanceId, info: InstanceInfo | None) -> None:
        """Show an instance of this node as it is from now on, or no more.

        While etcd is silent none of that is written; an instance that has come back meanwhile
        serves the requests of its own node all the same.
        """
        with self._showing:
            self._pending[instance] = info
            self._publish(told=True)

    def _publish(self, told: bool) -> None:
        """Make the view that of now, and tell the subscribers if they are to be told."""
        old = self._view
        self._view = view = self._with_own(self._listed)
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

    def _with_own(self, view: ClusterView) -> ClusterView:
        """The view that etcd gave, with what this node knows better; what it shows is forgotten."""
        shown = view.instances
        self._pending = {i: info for i, info in self._pending.items() if shown.get(i) != info}
        if not self._pending:
            return view
        merged = {**shown, **self._pending}
        instances = {i: info for i, info in merged.items() if info is not None}
        return dataclasses.replace(view, instances=MappingProxyType(instances))


class LoadReporter:
    """Takes a node's loads to its registry, on change and at most 5 times a second.

    Lives on the event loop. What changes meanwhile is in the next report: the latest wins.
    """

    def __init__(
        self,
        loads: Callable[[], Iterable[InstanceLoad]],
        report: Callable[[Sequence[InstanceLoad]], None],
    ) -> None:
        self._loads = loads
        self._report = report
        self._timer: asyncio.TimerHandle | None = None
        self._sent = float("-inf")
        self._stopped = False

    def changed(self) -> None:
        """Something about a load has changed; cheap, called in each step."""
        if self._timer is None and not self._stopped:
            loop = asyncio.get_running_loop()
            # Not at once: what belongs to one step, or one burst, goes into one report.
            delay = max(self._sent + REPORT_INTERVAL - loop.time(), REPORT_SETTLE)
            self._timer = loop.call_later(delay, self._send)

    def stop(self) -> None:
        """Report no more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _send(self) -> None:
        self._timer = None
        self._sent = asyncio.get_running_loop().time()
        self._report(sorted(self._loads(), key=lambda load: load.instance))
