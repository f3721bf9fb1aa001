"""vLLM's AsyncLLM with a door of its own, through which all routes' requests come."""

from http import HTTPStatus
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from llumnix.engine.vllm.compat import failed
from llumnix.engine.vllm.grammars import Grammars
from llumnix.loop_turns import Turns

NO_GRAMMAR = "a modelled engine's tokens follow no grammar"


class DoorLLM(AsyncLLM):
    """Takes requests in slices, and those with a grammar once it was tried elsewhere.

    Without `grammars`, as over modelled engines, none is taken.
    """

    def __init__(self, *args: Any, grammars: Grammars | None = None, **kwargs: Any) -> None:
        self._grammars = grammars
        self._turns = Turns()
        super().__init__(*args, **kwargs)

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Add a request, as vLLM does. Raises what `Grammars.admit` does."""
        choices = 1
        if isinstance(params, SamplingParams):
            choices = params.n
            if params.structured_outputs is not None:
                if self._grammars is None:
                    raise failed(NO_GRAMMAR, HTTPStatus.BAD_REQUEST)
                await self._grammars.admit(params)
        await self._turns.take(choices)
        return await super().add_request(request_id, prompt, params, *args, **kwargs)
