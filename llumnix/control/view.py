"""How keys become the view of the cluster: what is lacking is kept a while, what is new decoded.

Unknown is not lost: `Grace` keeps what a list of etcd lacks, though nobody saw it deleted.
"""

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


class Grace:
    """Keeps missing keys for `seconds`, in which whoever wrote them can come back.

    After an outage a list may lack a node only because that node has not yet found etcd again, or
    because etcd has lost its data. And the first thing that etcd does when it is back may be to end
    the leases that nobody could prolong meanwhile. So for as long after each list but the first,
    deletions count as little as what a list lacks; later a deletion that a watch saw is believed.

    `concerns` says which keys are kept. Times are given by the caller, from one steady clock; they
    must be of moments in which etcd is known to answer, so that no grace ends in an outage. For one
    thread.
    """

    def __init__(self, seconds: float, concerns: Callable[[str], bool]) -> None:
        self._seconds = seconds
        self._concerns = concerns
        self._items: Mapping[str, KeyValue] = {}
        self._kept: dict[str, KeyValue] = {}
        self._end = float("inf")
        self._listed = False
        self._doubts_until = float("-inf")

    @property
    def kept(self) -> Collection[str]:
        """The keys that are shown though etcd does not hold them."""
        return self._kept.keys()

    def after_list(self, items: Mapping[str, KeyValue], now: float) -> Mapping[str, KeyValue]:
        """What to show after a list; whatever it lacks has its whole time from now on."""
        shown = {**self._kept, **self._items}
        self._kept = {
            key: kv for key, kv in shown.items() if key not in items and self._concerns(key)
        }
        self._end = now + self._seconds if self._kept else float("inf")
        if self._listed:
            self._doubts_until = now + self._seconds
        self._listed = True
        return self._show(items)

    def after_events(
        self, items: Mapping[str, KeyValue], deleted: Collection[str], now: float
    ) -> Mapping[str, KeyValue]:
        """What to show after changes that a watch told, some of which were deletions."""
        if now < self._doubts_until:
            shown = {**self._kept, **self._items}
            doubted = {k: shown[k] for k in deleted if k in shown and self._concerns(k)}
            self._kept |= doubted
            if doubted:
                self._end = now + self._seconds
        else:
            for key in [k for k in self._kept if k in deleted]:
                del self._kept[key]
        for key in [k for k in self._kept if k in items]:
            del self._kept[key]
        return self._show(items)

    def is_over(self, now: float) -> bool:
        """Whether there are keys whose time has run out, so that `end` has something to do."""
        return bool(self._kept) and now >= self._end

    def end(self) -> Mapping[str, KeyValue]:
        """What to show from now on: only what etcd holds."""
        self._kept.clear()
        return self._show(self._items)

    def _show(self, items: Mapping[str, KeyValue]) -> Mapping[str, KeyValue]:
        self._items = items
        return MappingProxyType({**items, **self._kept}) if self._kept else items


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
