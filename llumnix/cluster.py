"""The facts that every room shares: nodes, instances, their loads, and the view of the cluster.

Everything here is frozen: a view is replaced, never changed, so any thread may read the one it
holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

NodeId = str
InstanceId = str
# Which is checked where it comes from etcd: what has more bits can be told to no other process.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


def _nothing() -> Mapping[Any, Any]:
    return MappingProxyType({})


def instance_name(node: NodeId, slot: int) -> InstanceId:
    """The name of the instance in a slot of a node, of which there are 0, 1, …."""
    return f"{node}-{slot}"


def slot_at(node: NodeId, instance: InstanceId) -> int | None:
    """The slot of an instance of this node; None for one of another node."""
    number = instance.removeprefix(f"{node}-")
    return int(number) if number != instance and number.isdecimal() else None


def server_name(node: NodeId, index: int) -> NodeId:
    """By which name other nodes know an API server of a node that is a process of its own.

    No node has such a name, as # is in none.
    """
    return f"{node}#{index}"


def is_server_of(name: NodeId, node: NodeId) -> bool:
    """Whether it is the name of such an API server of this node."""
    return name.rpartition("#")[0] == node


def kv_blocks(tokens: int, block_size: int) -> int:
    """KV blocks that a sequence of so many tokens asks for: room for these and the next one."""
    return -(-(tokens + 1) // block_size)


class InstanceState(StrEnum):
    """Where an instance stands in its life; only a READY one gets new requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node as it presents itself to the others.

    `address` is host:port of its HTTP server; `epoch` is new with each start of the node's process,
    so that a restarted node is not taken for its predecessor.
    """

    id: NodeId
    address: str
    version: str
    epoch: Count
    max_instances: Count = 0  # most that it runs, whatever is desired there; 0: not known
    initial_instances: Count = 0  # as long as no number is desired there; 0: none, or unknown
    token_mark: str = ""  # shows which token it has out of etcd; empty if it was given one
    api_servers: Count = 1  # each of which dispatches
    peer_address: str = ""  # where the others dial it; empty: at `address`


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """An instance: one vLLM engine, the unit that requests are dispatched to."""

    id: InstanceId
    node: NodeId
    model: str
    state: InstanceState
    total_blocks: Count  # KV blocks in all; 0 until the engine is up
    block_size: Count  # tokens in a KV block
    role: str = "any"  # any | prefill | decode
    failed_starts: Count = 0  # of its engine in a row, since it was up the last time
    max_running: Count = 0  # requests in a batch, at most; 0: not known


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """What an instance reports of itself; the unit of memory is the KV block.

    `received` says, for each node that dispatches to this instance, the number of its last
    dispatch that this report already counts; whatever that node sent later is still in flight.
    """

    instance: InstanceId
    running: Count = 0  # requests in the batch
    waiting: Count = 0  # requests queued
    used_blocks: Count = 0  # held by running requests
    waiting_blocks: Count = 0  # asked for by all queued requests
    head_blocks: Count = 0  # asked for by the request at the head of the queue
    prefill_tokens: Count = 0  # not computed yet of all requests that have no first token
    preempted: Count = 0  # of the queued requests those that have run before
    preemptions: Count = 0  # since the instance started
    # How many requests it has of each priority (vLLM's numbers) but 0, running and queued.
    priorities: Mapping[int, Count] = field(default_factory=_nothing)
    received: Mapping[NodeId, Count] = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """One consistent snapshot of the cluster, as the registry last saw it."""

    revision: int = 0  # etcd revision up to which this view is complete
    nodes: Mapping[NodeId, NodeInfo] = field(default_factory=_nothing)
    instances: Mapping[InstanceId, InstanceInfo] = field(default_factory=_nothing)
    loads: Mapping[InstanceId, InstanceLoad] = field(default_factory=_nothing)
    desired: Mapping[NodeId, int] = field(default_factory=_nothing)
    # Which instance is to go first from a node, where desired/<node> names one.
    without: Mapping[NodeId, InstanceId] = field(default_factory=_nothing)
    draining: frozenset[str] = frozenset()  # nodes and instances under drain/
    leader: NodeId | None = None
    leader_epoch: int = 0

    def instances_of(self, node: NodeId) -> tuple[InstanceInfo, ...]:
        """The instances of one node, by id."""
        return tuple(i for _, i in sorted(self.instances.items()) if i.node == node)
