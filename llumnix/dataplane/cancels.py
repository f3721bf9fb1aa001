"""Requests that are to end where they run: all that come up in one turn of the loop go together.

When a thousand clients leave at once, an instance gets some dozens of messages, not a thousand.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from llumnix.cluster import InstanceId
from llumnix.tasks import TaskSet


class Cancels:
    """Gathers the ids of requests, and has them ended, one call for each instance and turn."""

    def __init__(self, cancel: Callable[[InstanceId, list[str]], Awaitable[None]]) -> None:
        self._cancel = cancel
        self._pending: dict[InstanceId, list[str]] = {}
        self._next: asyncio.Task[None] | None = None  # sends what is pending
        self._sending = TaskSet()

    def add(self, requests: Iterable[tuple[InstanceId, str]]) -> asyncio.Task[None]:
        """End requests, each at its instance; what is returned is done when that has been sent.

        Others wait for it too, so nobody may cancel it.
        """
        for instance, request_id in requests:
            self._pending.setdefault(instance, []).append(request_id)
        if self._next is None:
            self._next = self._sending.spawn(self._send(), name="cancels")
        return self._next

    async def _send(self) -> None:
        pending, self._pending = self._pending, {}
        self._next = None
        for instance, request_ids in pending.items():
            await self._cancel(instance, request_ids)
