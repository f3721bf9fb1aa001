"""The instances of a node, as their supervisor has them made, announced and withdrawn."""

import asyncio
import dataclasses
from collections.abc import Callable

from llumnix.cluster import InstanceId, InstanceInfo, InstanceLoad, InstanceState
from llumnix.control.registry import LoadReporter, Registry
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.node.api_servers.base import ApiServers
from llumnix.node.engines import MakeEngine


class Hosting:
    """What a supervisor acts on; made on the node's loop."""

    def __init__(
        self,
        exchange: Exchange,
        servers: ApiServers,
        registry: Registry,
        make_engine: MakeEngine,
        by_priority: bool,
        look: Callable[[], None],
    ) -> None:
        """`by_priority`: whether the engines' queues go by it. `look`: called on the loop when the
        frontend may be opened."""
        self._loop = asyncio.get_running_loop()
        self._servers = servers
        self._hosted = exchange.hosted
        self._registry = registry
        self._make_engine = make_engine
        self._by_priority = by_priority
        self._look = look
        self._reporter = LoadReporter(self._loads, registry.report_loads)

    def make(self, instance: InstanceId, slot: int) -> HostedInstance:
        """A new engine in a slot; on the loop."""
        engine = self._make_engine(instance, slot)
        changed = self._reporter.changed
        hosted = HostedInstance(engine, self._servers.home, changed, self._by_priority)
        self._hosted[instance] = hosted
        return hosted

    def requests(self, instance: InstanceId) -> int:
        """How many requests an instance has."""
        hosted = self._hosted.get(instance)
        return len(hosted.requests) if hosted else 0

    def announce(self, info: InstanceInfo) -> None:
        """Make an instance known; called on the supervisor's thread.

        None of this node's is ready for others while the frontend has not been opened: that keeps
        the loop busy for seconds, in which no token would get through.
        """
        if info.state is InstanceState.READY and not self._servers.tried:
            info = dataclasses.replace(info, state=InstanceState.STARTING)
            self._loop.call_soon_threadsafe(self._look)
        self._registry.announce_instance(info)

    def withdraw(self, instance: InstanceId) -> None:
        """It is no more; called on the supervisor's thread."""
        self._registry.withdraw_instance(instance)
        self._loop.call_soon_threadsafe(self._forget, instance)

    def stop(self) -> None:
        """Report no more loads."""
        self._reporter.stop()

    def _forget(self, instance: InstanceId) -> None:
        self._hosted.pop(instance, None)
        self._reporter.changed()  # else its last load would stay in etcd

    def _loads(self) -> list[InstanceLoad]:
        return [hosted.load() for hosted in self._hosted.values() if hosted.facts is not None]
