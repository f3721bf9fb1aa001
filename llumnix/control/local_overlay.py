"""What a node knows of its own instances before etcd shows it: its view is never behind itself."""

import dataclasses
import threading
from types import MappingProxyType

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo


class Ahead:
    """Announcements that no view has shown yet. For any thread.

    While etcd is silent none of them is written; an instance that has come back meanwhile serves
    the requests of its own node all the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[InstanceId, InstanceInfo | None] = {}  # None: withdrawn

    def announce(self, instance: InstanceInfo) -> None:
        """Show an instance of this node as it is from now on."""
        with self._lock:
            self._pending[instance.id] = instance

    def withdraw(self, instance: InstanceId) -> None:
        """Show an instance of this node no more."""
        with self._lock:
            self._pending[instance] = None

    def of(self, view: ClusterView) -> ClusterView:
        """The view that etcd gave, with what was announced since; forget what it shows already."""
        with self._lock:
            for instance in [i for i, p in self._pending.items() if view.instances.get(i) == p]:
                del self._pending[instance]
            pending = dict(self._pending)
        if not pending:
            return view
        merged = {**view.instances, **pending}
        instances = {i: info for i, info in merged.items() if info is not None}
        return dataclasses.replace(view, instances=MappingProxyType(instances))
