"""Opens vLLM's frontend once there is an instance to learn from, and tries again if that fails."""

import asyncio
import logging
from collections.abc import Callable

from llumnix.cluster import ClusterView
from llumnix.dataplane.client import ClusterClient
from llumnix.engine.base import EngineError, EngineFacts
from llumnix.node.options import NodeOptions
from llumnix.server.frontend import Frontend

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # until the frontend is tried again


class Opening:
    """A node's frontend, from the first try to open it to its end; lives on the node's loop."""

    def __init__(
        self,
        options: NodeOptions,
        client: ClusterClient,
        facts: Callable[[], EngineFacts | None],
        view: Callable[[], ClusterView],
        on_try: Callable[[], None],
        on_open: Callable[[], None],
    ) -> None:
        """`facts`: of an instance of this node, if one is up. `on_try`: called once, after the
        first try; `on_open`: when the frontend serves."""
        self._options = options
        self._client = client
        self._known = facts
        self._view = view
        self._on_try = on_try
        self._on_open = on_open
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self.frontend: Frontend | None = None
        self.tried = False  # whether it is open, or could not be opened the first time

    def look(self) -> None:
        """Begin, unless that was done already or there is no instance to learn from."""
        known = self._known() is not None or self._client.instances
        if known and self._task is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._open(), name="frontend")

    async def close(self) -> None:
        """End the frontend, or the opening of it."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.frontend is not None:
            await self.frontend.close()

    async def _open(self) -> None:
        frontend = Frontend(self._options.arguments, self._options.vllm, self._client)
        try:
            await frontend.open(await self._facts())
        except Exception as error:  # vLLM's, whatever it is; tried again as long as the node runs
            expected = isinstance(error, (EngineError, TimeoutError))
            logger.error("vLLM's frontend could not be opened: %s", error, exc_info=not expected)
            await frontend.close()
            self._has_tried()
            self._task = None
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self.look)
            return
        self.frontend = frontend
        self._has_tried()
        self._on_open()

    def _has_tried(self) -> None:
        if not self.tried:
            self.tried = True
            self._on_try()

    async def _facts(self) -> EngineFacts:
        """Facts of an instance of this node if one is up, else of any other."""
        if (known := self._known()) is not None:
            return known
        infos = [self._view().instances[i] for i in self._client.instances]
        if not infos:
            raise EngineError("no instance is ready")
        tasks = await self._client.get_supported_tasks_async()
        length = self._options.vllm.model_config.max_model_len
        return EngineFacts(infos[0].total_blocks, infos[0].block_size, length, tasks)
