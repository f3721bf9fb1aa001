"""The background tasks of one owner: kept while they run, and ended with it."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class TaskSet:
    """Tasks that nobody else keeps; lives on one event loop, which alone would hold them weakly."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None], name: str | None = None) -> asyncio.Task[None]:
        """Run it in a task of its own; what it raises is logged."""
        task = self.own(work, name)
        task.add_done_callback(_log_failure)
        return task

    def own(self, work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        """Likewise, for who waits for the task, and so hears of what it raises."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task

    def cancel(self) -> None:
        """Cancel all that run, without waiting for their end."""
        for task in self._tasks:
            task.cancel()

    def drop_oldest(self) -> None:
        """Cancel the one that has run for the longest, and keep it no longer."""
        oldest = next(iter(self._tasks))
        del self._tasks[oldest]
        oldest.cancel()

    async def wait(self) -> None:
        """Wait until all that run now have ended, however they do."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Cancel all that run, and wait for their end, and for that of those that they begin."""
        while self._tasks:
            self.cancel()
            await self.wait()


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the task %s failed", task.get_name(), exc_info=error)
