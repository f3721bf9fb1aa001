"""What has changed from one view of the cluster to the next, to be told to another process.

Facts travel as their values in etcd do. What has not changed stays the same object in the view that
is made, so whoever goes by identity (the dispatcher does) has no work with it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from llumnix.cluster import ClusterView, InstanceId, NodeId
from llumnix.control import codec

F = TypeVar("F")


class Whole(msgspec.Struct, frozen=True, array_like=True):
    """The small facts of a view, which are told whole."""

    revision: int
    desired: dict[NodeId, int]
    without: dict[NodeId, InstanceId]
    draining: list[str]
    leader: NodeId | None
    leader_epoch: int


class ViewChange(msgspec.Struct, frozen=True, array_like=True):
    """The facts that are new, as JSON, and None for those that are gone."""

    nodes: dict[NodeId, bytes | None]
    instances: dict[InstanceId, bytes | None]
    loads: dict[InstanceId, bytes | None]
    whole: Whole


def change(old: ClusterView, new: ClusterView) -> ViewChange:
    """What is to be told to who knows `old`; an empty view for who knows nothing."""
    return ViewChange(
        _changed(old.nodes, new.nodes, codec.encode_node),
        _changed(old.instances, new.instances, codec.encode_instance),
        _changed(old.loads, new.loads, lambda load: codec.encode_loads([load])),
        Whole(
            new.revision,
            dict(new.desired),
            dict(new.without),
            sorted(new.draining),
            new.leader,
            new.leader_epoch,
        ),
    )


def applied(view: ClusterView, change: ViewChange) -> ClusterView:
    """The view with that change. Raises ValueError for what is no fact of ours."""
    whole = change.whole
    return ClusterView(
        revision=whole.revision,
        nodes=_merged(view.nodes, change.nodes, codec.decode_node),
        instances=_merged(view.instances, change.instances, codec.decode_instance),
        loads=_merged(view.loads, change.loads, lambda _, value: codec.decode_loads(value)[0]),
        desired=MappingProxyType(whole.desired),
        without=MappingProxyType(whole.without),
        draining=frozenset(whole.draining),
        leader=whole.leader,
        leader_epoch=whole.leader_epoch,
    )


def _changed(
    old: Mapping[str, F], new: Mapping[str, F], encode: Callable[[F], bytes]
) -> dict[str, bytes | None]:
    if old is new:
        return {}
    found: dict[str, bytes | None] = {
        name: encode(fact) for name, fact in new.items() if old.get(name) is not fact
    }
    return found | dict.fromkeys(old.keys() - new.keys())


def _merged(
    old: Mapping[str, Any], changes: dict[str, bytes | None], decode: Callable[[str, bytes], Any]
) -> Mapping[str, Any]:
    if not changes:
        return old
    merged = dict(old)
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = decode(name, value)
    return MappingProxyType(merged)
