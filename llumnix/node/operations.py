"""What operators have a node do, for an API server in its own process."""

import asyncio
from typing import Any

from llumnix.cluster import ClusterView, InstanceId
from llumnix.control.etcd.errors import EtcdError
from llumnix.engine.base import EngineError
from llumnix.node.actor_system import Acting
from llumnix.node.control_plane import ControlPlane
from llumnix.server.operations import OperationError


class NodeOperations:
    """Lists and moves requests, and drains, by the parts of this node."""

    def __init__(self, control: ControlPlane, acting: Acting) -> None:
        self._control = control
        self._acting = acting

    def view(self) -> ClusterView:
        """The cluster as this node sees it now."""
        return self._control.view()

    async def requests(self) -> list[dict[str, Any]]:
        """All requests of the cluster, as far as its nodes answer."""
        return await self._acting.migrations.requests()

    async def migrate(self, request_id: str, destination: InstanceId) -> dict[str, Any]:
        """Move a request. OperationError: 404 for an unknown one or instance, 409 if it stays."""
        try:
            return await self._acting.migrations.migrate(request_id, destination)
        except LookupError as error:
            raise OperationError(404, str(error.args[0])) from error
        except EngineError as error:
            raise OperationError(409, str(error)) from error

    async def drain(self, name: str, cancel: bool) -> None:
        """Put the key of a drain into etcd, or take it out. OperationError: 503, etcd is silent."""
        registry = self._control.registry
        try:
            await asyncio.to_thread(registry.delete_drain if cancel else registry.put_drain, name)
        except EtcdError as error:
            raise OperationError(503, str(error)) from error
