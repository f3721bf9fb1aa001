"""Builds the cluster's view from a snapshot of its keys, decoding only what is new."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from llumnix.cluster import ClusterView
from llumnix.control import codec
from llumnix.control.etcd.types import KeyValue
from llumnix.control.keys import Keys, Kind

logger = logging.getLogger(__name__)

_DECODERS: Mapping[Kind, Callable[[str, bytes], Any]] = {
    Kind.NODE: codec.decode_node,
    Kind.INSTANCE: codec.decode_instance,
    Kind.LOAD: lambda _, value: codec.decode_loads(value),
    Kind.LEADER: lambda _, value: codec.decode_leader(value),
    Kind.DESIRED: lambda _, value: codec.decode_desired(value),
    Kind.DRAIN: lambda _, value: True,
}


class ViewBuilder:
    """Remembers what each key meant, so that a change costs one decoding. For one thread."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._seen: Mapping[str, KeyValue] = {}
        self._facts: dict[Kind, dict[str, Any]] = {kind: {} for kind in _DECODERS}
        self._leader_epoch = 0
        self._view = ClusterView()
        self.changed = False  # whether the last build found anything but a new revision

    def build(
        self, items: Mapping[str, KeyValue], revision: int, deleted: Collection[str] = ()
    ) -> ClusterView:
        """The view that these keys make up; parts that didn't change are shared with the last.

        A key in `deleted` counts as a change though it came and went since the last build: a leader
        whom this view never showed has gone all the same.
        """
        seen, self._seen = self._seen, items
        touched: set[Kind] = set()
        new = [kv for key, kv in items.items() if seen.get(key) is not kv]
        for kv in new:
            self._take_in(kv.key, kv, touched)
        if new or len(seen) != len(items):
            for key in seen.keys() - items.keys():
                self._drop(key, touched)
        for key in deleted:
            if key not in items:
                self._drop(key, touched)
        self.changed = bool(touched)
        self._view = self._assemble(revision, touched)
        return self._view

    def _take_in(self, key: str, kv: KeyValue, touched: set[Kind]) -> None:
        parsed = self._keys.parse(key)
        if parsed is None or parsed.kind not in _DECODERS:
            return
        kind, name = parsed
        touched.add(kind)
        if kind is Kind.LEADER:
            self._leader_epoch = kv.create_revision
        try:
            self._facts[kind][name] = _DECODERS[kind](name, kv.value)
        except ValueError as error:
            self._facts[kind].pop(name, None)
            logger.warning("%s is ignored: %s (%r).", key, error, kv.value[:80])

    def _drop(self, key: str, touched: set[Kind]) -> None:
        parsed = self._keys.parse(key)
        if parsed is not None and parsed.kind in _DECODERS:
            touched.add(parsed.kind)
            self._facts[parsed.kind].pop(parsed.name, None)

    def _assemble(self, revision: int, touched: set[Kind]) -> ClusterView:
        old, facts = self._view, self._facts

        def part(kind: Kind, last: Mapping[str, Any]) -> Mapping[str, Any]:
            return MappingProxyType(dict(facts[kind])) if kind in touched else last

        loads = old.loads
        if Kind.LOAD in touched:
            reports = facts[Kind.LOAD].values()
            loads = MappingProxyType({load.instance: load for node in reports for load in node})
        desired, without = old.desired, old.without
        if Kind.DESIRED in touched:
            wanted: dict[str, codec.Desired] = facts[Kind.DESIRED]
            desired = MappingProxyType({n: each.instances for n, each in wanted.items()})
            named = {n: each.without for n, each in wanted.items() if each.without}
            without = MappingProxyType(named)
        leader = facts[Kind.LEADER].get("")
        return ClusterView(
            revision=revision,
            nodes=part(Kind.NODE, old.nodes),
            instances=part(Kind.INSTANCE, old.instances),
            loads=loads,
            desired=desired,
            without=without,
            draining=frozenset(facts[Kind.DRAIN]) if Kind.DRAIN in touched else old.draining,
            leader=leader,
            leader_epoch=self._leader_epoch if leader is not None else 0,
        )


def changes(old: ClusterView, new: ClusterView) -> Iterator[str]:
    """One sentence for each node and instance that joined, left or changed its state, and leader.

    Which node leads has its epoch with it.
    """
    if old.nodes is not new.nodes:
        yield from (f"Node {n} has left." for n in sorted(old.nodes.keys() - new.nodes.keys()))
        for name, node in sorted(new.nodes.items()):
            was = old.nodes.get(name)
            if was is None:
                yield f"Node {name} has joined, at {node.address}."
            elif was.epoch != node.epoch:
                yield f"Node {name} has been started anew, at {node.address}."
    if old.instances is not new.instances:
        left = sorted(old.instances.keys() - new.instances.keys())
        yield from (f"Instance {i} of node {old.instances[i].node} has left." for i in left)
        for name, instance in sorted(new.instances.items()):
            before = old.instances.get(name)
            if before is None:
                yield f"Instance {name} of node {instance.node} has joined: {instance.state}."
            elif before.state is not instance.state:
                yield f"Instance {name} of node {instance.node} is {instance.state}."
    if (old.leader, old.leader_epoch) != (new.leader, new.leader_epoch):
        if new.leader is None:
            yield f"Nobody leads, after node {old.leader} in epoch {old.leader_epoch}."
        else:
            yield f"Node {new.leader} leads, in epoch {new.leader_epoch}."
