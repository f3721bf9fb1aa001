"""The request of vLLM's demo server: a prompt, sampling parameters beside it, text back."""

import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from llumnix.engine.vllm.compat import client_errors, failed

CLIENT_ERRORS = client_errors()
SERVER_ERROR = type(failed("", HTTPStatus.SERVICE_UNAVAILABLE))
MALFORMED: tuple[type[Exception], ...] = (
    *(msgspec.ValidationError, OverflowError, AttributeError),
    *CLIENT_ERRORS,
)

# Parameters by which vLLM's own parts talk to one another, and which nothing checks.
INNER = ("skip_clone", "output_text_buffer_length")


class BadRequest(Exception):
    """What the client sent can't be answered; the message says why."""


class Failed(Exception):
    """No engine has answered; the message says why, and `status` whether one may another time."""

    def __init__(self, message: str, status: HTTPStatus) -> None:
        super().__init__(message)
        self.status = status


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
        if inner := sorted(name for name in values if name.startswith("_") or name in INNER):
            raise BadRequest(f"Unexpected keyword argument {inner[0]!r}")
        try:
            params = SamplingParams(**values)
            # The engine decodes them with types, and must not be the first to find a wrong one.
            params = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
        except MALFORMED as error:
            raise BadRequest(str(error)) from error
        params.output_kind = (
            RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
        )
        return cls(prompt, params, stream)


async def generate(llm: AsyncLLM, generation: Generation) -> AsyncGenerator[list[str], None]:
    """The texts so far, prompt included, one for each choice; the last item is complete.

    Raises BadRequest, Failed.
    """
    request_id = f"generate-{uuid.uuid4().hex}"
    texts = [generation.prompt] * generation.params.n
    try:
        async for output in llm.generate(generation.prompt, generation.params, request_id):
            for choice in output.outputs:  # of a stream, those that have gone on
                texts[choice.index] = generation.prompt + choice.text
            yield list(texts)
    except CLIENT_ERRORS as error:  # such as a prompt that is too long
        raise BadRequest(str(error)) from error
    except SERVER_ERROR as error:
        status = getattr(error, "http_status", HTTPStatus.SERVICE_UNAVAILABLE)
        raise Failed(str(error), status) from error
