"""The request of vLLM's demo server: a prompt, sampling parameters beside it, text back."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from llumnix.engine.vllm.compat import client_errors

CLIENT_ERRORS = client_errors()


class BadRequest(Exception):
    """What the client sent can't be answered; the message says why."""


@dataclass(frozen=True)
class Generation:
    """One checked request."""

    prompt: str
    params: SamplingParams
    stream: bool

    @classmethod
    def parse(cls, body: Any) -> "Generation":
        """Check a decoded body: `prompt`, `stream`, and any of vLLM's sampling parameters.

        Raises BadRequest.
        """
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object")
        values = dict(body)
        prompt, stream = values.pop("prompt", None), values.pop("stream", False)
        if not isinstance(prompt, str) or not isinstance(stream, bool):
            raise BadRequest("prompt must be a string, and stream true or false")
        try:
            params = SamplingParams(**values)
        except CLIENT_ERRORS as error:
            raise BadRequest(str(error)) from error
        params.output_kind = (
            RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
        )
        return cls(prompt, params, stream)


async def generate(llm: AsyncLLM, generation: Generation) -> AsyncIterator[list[str]]:
    """The texts so far, prompt included, one for each choice; the last item is complete.

    Raises BadRequest, and whatever the engine's client raises.
    """
    request_id = f"generate-{uuid.uuid4().hex}"
    try:
        async for output in llm.generate(generation.prompt, generation.params, request_id):
            yield [generation.prompt + choice.text for choice in output.outputs]
    except CLIENT_ERRORS as error:  # such as a prompt that is too long
        raise BadRequest(str(error)) from error
