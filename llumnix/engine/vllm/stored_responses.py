"""Answers of `/v1/responses` that outlive their request, which vLLM keeps track of in plain dicts.

It has no hook for them and no limit, so its dicts are replaced by mappings that know when something
is put in. vLLM has had them under these names, as dicts, in all supported versions.
"""

import asyncio
from collections.abc import Callable
from typing import Any

Task = asyncio.Task[Any]


class BackgroundTasks(dict[str, Task]):
    """vLLM's tasks for answers in the background, by the answers' ids."""

    def __init__(self, on_start: Callable[[Task], None]) -> None:
        """`on_start`: called with each new task, in its request's handler."""
        super().__init__()
        self._on_start = on_start

    def __setitem__(self, response_id: str, task: Task) -> None:
        """A request's answer goes on in the background."""
        super().__setitem__(response_id, task)
        self._on_start(task)


def watch_background(state: Any, on_start: Callable[[Task], None]) -> None:
    """Have `on_start` called for each answer in the background of vLLM's application.

    `state` is the application's. Raises ImportError if this version has its tasks elsewhere.
    """
    serving = getattr(state, "openai_serving_responses", None)
    if serving is None:
        return
    if getattr(serving, "background_tasks", None) != {}:
        raise ImportError("vLLM keeps its tasks for answers in the background elsewhere")
    serving.background_tasks = BackgroundTasks(on_start)
