"""Who is in the cluster and how loaded they are: this node's announcements, and the view of all."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceLoad, NodeId, NodeInfo
from llumnix.control.codec import encode_instance, encode_node
from llumnix.control.etcd import Etcd
from llumnix.control.keys import Keys
from llumnix.control.kv import KeyValue
from llumnix.control.loads import LoadPublisher
from llumnix.control.session import Session
from llumnix.control.view import ViewBuilder
from llumnix.control.watch import PrefixWatch

log = logging.getLogger(__name__)


class Registry:
    """Membership and load. Announcing never blocks and never fails: the session writes it.

    `view` is the last snapshot, which stays while etcd is unreachable. The session must be started
    and stopped by its owner; what was announced vanishes with it.
    """

    def __init__(self, etcd: Etcd, session: Session, keys: Keys) -> None:
        self._etcd = etcd
        self._session = session
        self._keys = keys
        self._builder = ViewBuilder(keys)
        self._watch = PrefixWatch(etcd, keys.prefix, self._on_change)
        self._publisher = LoadPublisher(self._write_loads)
        self._node: NodeId | None = None
        self._view = ClusterView()
        self._lock = threading.Lock()
        self._subscribers: tuple[Callable[[ClusterView], None], ...] = ()

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

    def start(self) -> None:
        """Begins to watch; returns at once."""
        self._publisher.start()
        self._watch.start()

    def wait_view(self, within: float) -> bool:
        """Waits for the first view, at most `within` seconds; whether there is one."""
        return self._watch.wait_listed(within)

    def stop(self) -> None:
        """Ends the threads; no subscriber is called once this has returned."""
        self._publisher.stop()
        self._watch.stop()

    def subscribe(self, callback: Callable[[ClusterView], None]) -> None:
        """Has `callback` called with each new view, on the watch's thread; it must not block."""
        with self._lock:
            self._subscribers = (*self._subscribers, callback)

    def announce_node(self, node: NodeInfo) -> None:
        """Makes this node known; call it before `report_loads`."""
        self._node = node.id
        self._session.put(self._keys.node(node.id), encode_node(node))

    def announce_instance(self, instance: InstanceInfo) -> None:
        """Makes an instance of this node known, or its new state."""
        self._session.put(self._keys.instance(instance.id), encode_instance(instance))

    def withdraw_instance(self, instance: InstanceId) -> None:
        """Takes an announced instance out of the cluster."""
        self._session.remove(self._keys.instance(instance))

    def report_loads(self, loads: Sequence[InstanceLoad]) -> None:
        """The loads of all this node's instances; written if changed, at most 5 times a second.

        Raises RuntimeError before `announce_node`.
        """
        if self._node is None:
            raise RuntimeError("a node announces itself before it reports loads")
        self._publisher.report(loads)

    def put_drain(self, name: str) -> None:
        """Has a node or an instance emptied until `delete_drain`. Blocks; raises EtcdError."""
        self._etcd.put(self._keys.drain(name), b"{}")

    def delete_drain(self, name: str) -> None:
        """Has it emptied no more. Blocks; raises EtcdError."""
        self._etcd.delete(self._keys.drain(name))

    def _write_loads(self, value: bytes) -> None:
        assert self._node is not None
        self._session.put(self._keys.load(self._node), value)

    def _on_change(self, items: Mapping[str, KeyValue], revision: int) -> None:
        self._session.observe(items, revision)
        self._view = view = self._builder.build(items, revision)
        if not self._builder.changed:
            return
        for subscriber in self._subscribers:
            try:
                subscriber(view)
            except Exception:
                # One subscriber's fault must not hide the view from the others.
                log.exception("A subscriber failed on the view of revision %d.", revision)
