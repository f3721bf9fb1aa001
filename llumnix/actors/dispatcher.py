"""Who chooses the instance for each new request of a node: an actor, and how the placer asks it."""

import time
from collections.abc import Callable
from random import Random

from pykka import ActorDeadError

from llumnix.actors.base import Actor, Handle
from llumnix.cluster import ClusterView, InstanceId, NodeId, kv_blocks
from llumnix.dataplane.placer import NoInstance, Route
from llumnix.metrics import DISPATCH_SECONDS
from llumnix.policy.decision_context import TERMS, Terms
from llumnix.policy.dispatch import Policy, Request
from llumnix.policy.dispatch_state import DispatchState, is_awaited, is_candidate


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
        self._board = DispatchState(node, policy, top_k, Random(seed), first, terms)
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
    ) -> Route | None:
        """The instance for a request that has `tokens` already; None when no instance is ready."""
        blocks = kv_blocks(tokens, self._block_size)
        instance = self._board.decide(Request(tokens, blocks, priority), exclude)
        if instance is None:
            return None
        sequence = self._board.sent(instance, blocks, tokens, priority)
        return Route(instance, self._view.instances[instance].node, sequence)


class Dispatching:
    """The dispatcher of one node, which its actor decides for; lives on the node's loop."""

    def __init__(
        self, view: Callable[[], ClusterView], actor: Callable[[], Handle[DispatcherActor]]
    ) -> None:
        self._view = view
        self._actor = actor

    def ready(self) -> dict[InstanceId, NodeId]:
        """The instances that take requests, wherever they are."""
        view = self._view()
        return {i.id: i.node for i in view.instances.values() if is_candidate(view, i)}

    def awaited(self) -> bool:
        """Whether an instance is starting that will take requests when it is up."""
        view = self._view()
        return any(is_awaited(view, i) for i in view.instances.values())

    async def decide(self, tokens: int, priority: int, avoid: frozenset[InstanceId]) -> Route:
        """Choose an instance for a request. Raises NoInstance."""
        began = time.perf_counter()
        try:
            route = await self._actor().ask(DispatcherActor.decide, tokens, priority, avoid)
        except (ActorDeadError, TimeoutError) as error:
            raise NoInstance("the dispatcher does not answer, or is being started again") from error
        DISPATCH_SECONDS.observe(time.perf_counter() - began)
        if route is None:
            raise NoInstance("no instance is ready")
        return route

    def undo(self, route: Route) -> None:
        """Have the actor forget a decision that came to nothing."""
        self._actor().notify(DispatcherActor.undo, route.instance, route.sequence)
