"""The actor that chooses the instance for each new request of this node."""

import time
from random import Random
from typing import NamedTuple

from llumnix.actors.base import Actor
from llumnix.cluster import ClusterView, InstanceId, NodeId, kv_blocks
from llumnix.policy.decision_context import TERMS, Terms
from llumnix.policy.dispatch import Policy, Request
from llumnix.policy.dispatch_state import DispatchBoard


class Dispatched(NamedTuple):
    """A decision: the instance, its node, and the number of this dispatch."""

    instance: InstanceId
    node: NodeId
    sequence: int


class DispatcherActor(Actor):
    """Decides from the load registry plus what this node has itself sent since each report."""

    def __init__(
        self,
        node: NodeId,
        policy: Policy,
        top_k: int,
        seed: int | None = None,
        terms: Terms = TERMS,
        first_sequence: int = 0,
    ) -> None:
        """Numbers of dispatches begin with the first one given; 0: with the time in microseconds.

        So they go on above those of any earlier process of the same node.
        """
        super().__init__()
        first = first_sequence or time.time_ns() // 1000
        self._board = DispatchBoard(node, policy, top_k, Random(seed), first, terms)
        self._view = ClusterView()
        self._block_size = 1

    def update_view(self, view: ClusterView) -> None:
        """Take over a newer snapshot of the cluster."""
        self._view = view
        sizes = [i.block_size for i in view.instances.values() if i.total_blocks]
        self._block_size = min(sizes, default=1)
        self._board.update_view(view)

    def undo(self, instance: InstanceId, sequence: int) -> None:
        """A dispatch failed: do not count its request as on its way any more."""
        self._board.cancel(instance, sequence)

    def decide(
        self, tokens: int, priority: int = 0, exclude: frozenset[InstanceId] = frozenset()
    ) -> Dispatched | None:
        """The instance for a request that has `tokens` already; None when no instance is ready."""
        blocks = kv_blocks(tokens, self._block_size)
        instance = self._board.decide(Request(tokens, blocks, priority), exclude)
        if instance is None:
            return None
        sequence = self._board.sent(instance, blocks, tokens, priority)
        return Dispatched(instance, self._view.instances[instance].node, sequence)
