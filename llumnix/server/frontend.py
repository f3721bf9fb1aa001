"""vLLM's frontend, unchanged, above llumnix's client: tokenising, sampling parameters, OpenAI API.

Its FastAPI application is handed out as a plain ASGI application.
"""

import argparse
import contextlib
import logging
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import anyio
from fastapi import HTTPException as FastapiHTTPException
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import BaseRoute, Match
from vllm import envs
from vllm.config import VllmConfig
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor import Executor
from vllm.v1.outputs import LogprobsTensors

from llumnix.dataplane.client import ClusterClient
from llumnix.engine.base import EngineFacts
from llumnix.engine.vllm import compat
from llumnix.engine.vllm.frontend.body_shapes import Shapes
from llumnix.engine.vllm.frontend.derendering import bound_derendering
from llumnix.engine.vllm.frontend.handlers import DoorLLM, Streams
from llumnix.engine.vllm.frontend.media import bound_media
from llumnix.engine.vllm.frontend.off_the_loop import spare_the_loop
from llumnix.engine.vllm.frontend.stored_responses import bound_stored_responses
from llumnix.engine.vllm.grammars.checks import Grammars
from llumnix.server.stored import HANDLER

logger = logging.getLogger(__name__)


class Frontend:
    """vLLM's server application for this node's clients."""

    def __init__(
        self, arguments: argparse.Namespace, config: VllmConfig, client: ClusterClient
    ) -> None:
        self._arguments = arguments
        self._config = config
        self._client = client
        self._stack = contextlib.AsyncExitStack()
        self._grammars = Grammars(config, arguments.grammar_timeout)
        self.llm: AsyncLLM | None = None
        self.app: Any = None  # an ASGI application, once open
        self._routes: list[BaseRoute] = []
        self.streams: Streams | None = None
        self.shapes: Shapes | None = None

    async def open(self, facts: EngineFacts) -> None:
        """Build the application; `facts` are those of the first instance that is ready."""
        self._learn(facts)
        self._stack.push_async_callback(self._grammars.close)
        if self._arguments.engine == "vllm":  # whose fork server is there
            self._grammars.warm()
        compat.answer_quickly()
        with compat.engine_core_client(self._client):
            self.llm = llm = DoorLLM(
                grammars=None if self._arguments.engine == "sim" else self._grammars,
                vllm_config=self._config,
                executor_class=Executor.get_class(self._config),
                log_stats=not self._arguments.disable_log_stats,
                log_requests=self._arguments.enable_log_requests,
                aggregate_engine_logging=self._arguments.aggregate_engine_logging,
                usage_context=UsageContext.OPENAI_API_SERVER,
            )
        self._stack.callback(llm.shutdown)
        self._client.bind(self._fail)
        self._client.prompt_logprobs.take_in.bind(self._take_in)
        tasks = facts.tasks
        # It has documents scored where the embedding of their query is: in one engine's worker.
        self._arguments.enable_flash_late_interaction = False
        arguments = without_keys(self._arguments)
        bound_media(llm.model_config.is_multimodal_model)
        app = compat.server_symbol("build_app")(arguments, tasks, llm.model_config)
        await compat.server_symbol("init_app_state")(llm, app.state, arguments, tasks)
        bound_stored_responses(app.state, HANDLER)
        bound_derendering(app.state)
        spare_the_loop(app)
        # Its answer to an engine's errors tells its own server to exit, which is not here.
        app.state.server = SimpleNamespace(should_exit=False)
        # vLLM answers FastAPI's errors in OpenAI's shape; those of the router are Starlette's.
        _answer_alike(app, StarletteHTTPException, FastapiHTTPException)
        await self._stack.enter_async_context(app.router.lifespan_context(app))
        async with anyio.create_task_group():
            pass  # it is loaded at its first use, which would be in the middle of streams
        self.streams = Streams(app, self._arguments)
        self.shapes = Shapes(app, self._arguments.root_path or "")
        self._routes = app.router.routes
        self.app = app
        # vLLM looks environment variables up for every token; none changes from here on.
        envs.enable_envs_cache()

    @property
    def sound(self) -> bool:
        """Whether vLLM's frontend still passes outputs on."""
        return self.llm is not None and not self.llm.errored

    def has(self, path: str) -> bool:
        """Whether the application has a route for this path, whatever the method."""
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        scope["root_path"] = self._arguments.root_path or ""
        return any(route.matches(scope)[0] != Match.NONE for route in self._routes)

    async def close(self) -> None:
        """End vLLM's background tasks."""
        await self._stack.aclose()

    def stop(self, request_ids: list[str]) -> None:
        """End requests at their engines, whose handlers are to end soon and to clear up here."""
        self._client.end(request_ids)

    def end(self, request_ids: list[str]) -> None:
        """End requests that nobody waits for any more; those that have ended do not matter."""
        if self.llm is None:
            return
        known = self.llm.output_processor.request_states
        left = [i for i in request_ids if i in known or i in self._client.ledger]
        if left:
            self.llm.output_processor.abort_requests(left, internal=True)
            self._client.end(left)

    def _fail(self, request_id: str, reason: str, status: HTTPStatus) -> None:
        """End a request whose outputs will never come: its client gets `reason` as an error."""
        assert self.llm is not None
        processor = self.llm.output_processor
        state = processor.request_states.get(request_id)
        if state is None:
            return
        parent = state.parent_req  # with n > 1, the other choices end too
        whole = request_id if parent is None else parent.request_id
        ended = processor.abort_requests([whole], internal=True)
        self._client.end(ended)
        if state.queue is not None:
            state.queue.put(compat.failed(reason, status))

    def _take_in(self, request_id: str, tensors: LogprobsTensors) -> bool:
        """Enter logprobs of a prompt's tokens; False if there is no such request any more."""
        assert self.llm is not None
        state = self.llm.output_processor.request_states.get(request_id)
        if state is None or state.logprobs_processor is None:
            return False
        state.logprobs_processor.update_from_output(
            EngineCoreOutput(request_id, [], new_prompt_logprobs_tensors=tensors)
        )
        return True

    def _learn(self, facts: EngineFacts) -> None:
        """What vLLM's own client would have written into the configuration at engine start."""
        self._config.cache_config.num_gpu_blocks = facts.total_blocks
        self._config.cache_config.block_size = facts.block_size
        self._config.model_config.max_model_len = facts.max_model_len


def without_keys(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with no key for vLLM's own check, which guards some of its routes only.

    The server in front has let in whoever comes here, by keys of which vLLM may not know. An empty
    key is none, and is taken before VLLM_API_KEY.
    """
    return argparse.Namespace(**{**vars(arguments), "api_key": [""]})


def _answer_alike(app: Any, unhandled: type[Exception], handled: type[Exception]) -> None:
    """Have an exception answered as another one is, in the middleware that is built already."""
    layer = app.middleware_stack or app.build_middleware_stack()
    handler = app.exception_handlers[handled]
    app.exception_handlers[unhandled] = handler
    while layer is not None and not isinstance(layer, ExceptionMiddleware):
        layer = getattr(layer, "app", None)
    if layer is not None:
        layer.add_exception_handler(unhandled, handler)
