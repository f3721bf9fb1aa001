"""Which requests an engine runs, and in which order the others wait, by what it tells of itself.

An engine says after each step how many requests it runs, and not which. That follows from how
vLLM's schedulers admit and preempt; what is here is one step old at most.
"""

from collections.abc import Iterable

from llumnix.dataplane.hosted_request import Tenant


class Order:
    """The requests of one engine: its batch, and its queue."""

    def __init__(self, by_priority: bool = False) -> None:
        """`by_priority`: whether the engine's queue goes by priority first."""
        self._by_priority = by_priority
        self.queue: list[Tenant] = []  # in the order in which they are to run
        self._batch: dict[str, Tenant] = {}  # by name, in the order in which they were admitted

    def add(self, tenant: Tenant) -> None:
        """It has come. One that brought outputs goes before all that are queued already."""
        self._wait(tenant, first=tenant.resumed)

    def remove(self, tenant: Tenant) -> None:
        """It has ended, or gone."""
        if self._batch.pop(tenant.name, None) is None:
            self.queue.remove(tenant)

    def clear(self) -> None:
        """All are gone."""
        self.queue, self._batch = [], {}

    def step(self, running: int, answered: Iterable[Tenant]) -> None:
        """A step has ended: so many run, among them those that have got something and go on."""
        for tenant in answered:
            if tenant.name not in self._batch:
                self.queue.remove(tenant)
                self._batch[tenant.name] = tenant
        while len(self._batch) > running:
            preempted = self._batch.pop(self._least())
            self._wait(preempted, first=True)
        while len(self._batch) < running and self.queue:
            admitted = self.queue.pop(0)
            self._batch[admitted.name] = admitted

    def _least(self) -> str:
        """Who is preempted: the last admitted, or by priority the least urgent."""
        if self._by_priority:
            return max(self._batch, key=lambda name: self._batch[name].urgency())
        return next(reversed(self._batch))

    def _wait(self, tenant: Tenant, first: bool) -> None:
        if self._by_priority:
            self.queue.append(tenant)
            self.queue.sort(key=Tenant.urgency)
        elif first:
            self.queue.insert(0, tenant)
        else:
            self.queue.append(tenant)
