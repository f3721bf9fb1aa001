"""How many instances each node has, is to have, and has room for, as a view shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceState, NodeId
from llumnix.policy.dispatch_state import is_candidate


class Place(NamedTuple):
    """The instances of one node, counted."""

    wanted: int  # are to run there
    up: int  # are ready
    draining: int  # drain, to be stopped
    held_back: int  # an operator drains by name; they run, but serve nothing new
    room: float  # further ones that may be wanted there


@dataclass(frozen=True, slots=True)
class InstanceCounts:
    """The instances of the cluster, counted by node.

    Nodes that an operator drains, or that are about to leave, have no place: nothing is changed
    there, and what they have serves nobody new, but still runs.
    """

    places: Mapping[NodeId, Place]
    serving: Mapping[InstanceId, InstanceInfo]  # those that get new requests
    elsewhere: int  # instances on nodes without a place

    @property
    def wanted(self) -> int:
        """How many instances are to serve, once all that is desired is done."""
        return sum(place.wanted - place.held_back for place in self.places.values())

    def missing_to(self, minimum: int) -> int:
        """How many more there are to be for `minimum` to serve."""
        return max(minimum - self.wanted, 0)

    @property
    def total(self) -> int:
        """How many instances are to run, whether they serve or not."""
        return sum(place.wanted for place in self.places.values()) + self.elsewhere

    @property
    def missing(self) -> Mapping[NodeId, int]:
        """How many instances that are wanted on each node are not up yet."""
        short = {node: place.wanted - place.up for node, place in self.places.items()}
        return {node: number for node, number in short.items() if number > 0}

    @property
    def draining(self) -> Mapping[NodeId, int]:
        """How many instances drain on each node because fewer are wanted there."""
        return {node: place.draining for node, place in self.places.items() if place.draining}


def count_instances(view: ClusterView) -> InstanceCounts:
    """Count the instances that a view shows."""
    places: dict[NodeId, Place] = {}
    elsewhere = 0
    for node in sorted(view.nodes):
        place = _place(view, node)
        if node in view.draining or _is_leaving(view, node):
            elsewhere += max(place.wanted, len(view.instances_of(node)))
        else:
            places[node] = place
    serving = {
        i: info
        for i, info in sorted(view.instances.items())
        if info.node in places and is_candidate(view, info)
    }
    return InstanceCounts(places, serving, elsewhere)


def _place(view: ClusterView, node: NodeId) -> Place:
    infos = view.instances_of(node)
    staying = [i for i in infos if i.state is not InstanceState.DRAINING]
    limit = view.nodes[node].max_instances or inf  # 0: a node of an older version, not known
    # Without a number in etcd a node has what it was started for, though one that has just joined
    # shows none of it yet. And what runs there goes on when a number is lost.
    unsaid = max(view.nodes[node].initial_instances, len(staying))
    wanted = int(min(view.desired.get(node, unsaid), limit))
    return Place(
        wanted,
        up=sum(i.state is InstanceState.READY for i in staying),
        # One that is to be kept may still be shown as draining.
        draining=max(0, min(len(infos) - len(staying), len(infos) - wanted)),
        held_back=sum(i.id in view.draining for i in staying),
        room=limit - wanted,
    )


def _is_leaving(view: ClusterView, node: NodeId) -> bool:
    """Whether all instances of a node drain though nobody wanted that: the node itself stops."""
    states = {info.state for info in view.instances_of(node)}
    return states == {InstanceState.DRAINING} and view.desired.get(node) != 0
