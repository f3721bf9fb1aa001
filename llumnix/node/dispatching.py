"""How a node's placer gets decisions: from the dispatcher's actor, and from the latest view."""

import time
from collections.abc import Callable

from pykka import ActorDeadError

from llumnix.actors.dispatcher import DispatcherActor
from llumnix.cluster import ClusterView, InstanceId, NodeId
from llumnix.dataplane.placer import NoInstance, Route
from llumnix.metrics import DISPATCH_SECONDS
from llumnix.node.actor_system import Acting
from llumnix.policy.dispatch_state import is_awaited, is_candidate


class Dispatching:
    """The dispatcher of one node, which its actor decides for; lives on the node's loop."""

    def __init__(self, view: Callable[[], ClusterView], acting: Acting) -> None:
        self._view = view
        self._acting = acting

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
            decision = await self._acting.dispatch.ask(
                DispatcherActor.decide, tokens, priority, avoid
            )
        except (ActorDeadError, TimeoutError) as error:
            raise NoInstance("the dispatcher does not answer, or is being started again") from error
        DISPATCH_SECONDS.observe(time.perf_counter() - began)
        if decision is None:
            raise NoInstance("no instance is ready")
        return Route(decision.instance, decision.node, decision.sequence)

    def undo(self, route: Route) -> None:
        """Have the actor forget a decision that came to nothing."""
        self._acting.dispatch.notify(DispatcherActor.undo, route.instance, route.sequence)
