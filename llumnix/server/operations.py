"""What an API server asks of its node for an operator: to list and move requests, and to drain."""

from typing import Any, Protocol

from llumnix.cluster import ClusterView, InstanceId


class OperationError(Exception):
    """What an operator has asked for can't be done: an HTTP status, and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Operations(Protocol):
    """The node behind an API server, in the same process or in another one."""

    def view(self) -> ClusterView:
        """The cluster as the node sees it now."""

    async def requests(self) -> list[dict[str, Any]]:
        """All requests of the cluster, running and waiting. Raises OperationError."""

    async def migrate(self, request_id: str, destination: InstanceId) -> dict[str, Any]:
        """Move a request; what the move was. Raises OperationError."""

    async def drain(self, name: str, cancel: bool) -> None:
        """Begin the drain of a node or an instance, or end it. Raises OperationError."""
