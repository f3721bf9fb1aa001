"""What this server has of vLLM's frontend: its AsyncLLM, and its handlers of streams."""

import argparse
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import Request
from vllm import RequestOutput, SamplingParams, envs
from vllm.v1.engine.async_llm import AsyncLLM

from llumnix.engine.vllm.compat import failed, stream_handlers
from llumnix.engine.vllm.grammars.checks import Grammars
from llumnix.engine.vllm.grammars.time_limit import SLOW
from llumnix.loop_turns import SLICE, Turns

NO_GRAMMAR = "a modelled engine's tokens follow no grammar"
# Logprobs of prompt tokens in one answer, each of which costs the event loop 2 microseconds in one
# piece; or so many for each token of the context, if that is more: the least that can be asked for.
PROMPT_LOGPROBS, PROMPT_LOGPROBS_PER_TOKEN = 32_768, 2
_TOO_SLOW = "the grammar or schema takes too long to follow; make it simpler, or unambiguous"
# What may leave a grammar no token to go on with; logit_bias makes none impossible.
_FORBIDDING = ("allowed_token_ids", "bad_words", "min_tokens")
# The square of max_pattern_size, times min_count: half as many tokens are compared in the engine's
# scheduler after each token at worst, 20 in a microsecond.
REPETITION = 65_536


class DoorLLM(AsyncLLM):
    """vLLM's AsyncLLM with a door of its own, through which all routes' requests come.

    Takes requests in slices, and those with a grammar once it was tried elsewhere.

    Without `grammars`, as over modelled engines, none is taken.
    """

    def __init__(self, *args: Any, grammars: Grammars | None = None, **kwargs: Any) -> None:
        self._grammars = grammars
        self._turns = Turns(seconds=SLICE)
        super().__init__(*args, **kwargs)

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Add a request, as vLLM does. Raises what `Grammars.admit` does."""
        choices = 1
        if isinstance(params, SamplingParams):
            choices = params.n
            self._check_logprobs(prompt, params)
            _check_repetition(params)
            if params.structured_outputs is not None:
                if self._grammars is None:
                    raise failed(NO_GRAMMAR, HTTPStatus.BAD_REQUEST)
                await self._grammars.admit(params)
        await self._turns.take(choices)
        return await super().add_request(request_id, prompt, params, *args, **kwargs)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of a request, as vLLM has them.

        Raises vLLM's validation error where a grammar takes an engine too long, or leaves no token
        together with other parameters.
        """
        outputs: AsyncGenerator[RequestOutput, None]
        outputs = super().generate(prompt, sampling_params, *args, **kwargs)
        if getattr(sampling_params, "structured_outputs", None) is None:
            return outputs
        forbidding = [name for name in _FORBIDDING if getattr(sampling_params, name)]
        return _unless_its_grammar_ends_it(outputs, forbidding)

    def _check_logprobs(self, prompt: Any, params: SamplingParams) -> None:
        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if params.prompt_logprobs is None or not tokens:
            return
        model = self.model_config
        each = params.prompt_logprobs if params.prompt_logprobs >= 0 else model.get_vocab_size()
        asked = len(tokens) * (each + 1) * params.n
        most = max(PROMPT_LOGPROBS, PROMPT_LOGPROBS_PER_TOKEN * model.max_model_len)
        if asked > most:
            raise failed(
                f"{asked} logprobs of prompt tokens are more than the {most} that one answer may "
                "have: ask for fewer of each, for fewer choices, or for a shorter prompt",
                HTTPStatus.BAD_REQUEST,
            )


async def _unless_its_grammar_ends_it(
    outputs: AsyncGenerator[RequestOutput, None], forbidding: list[str]
) -> AsyncGenerator[RequestOutput, None]:
    """These outputs; `forbidding`: parameters that may leave the grammar no token.

    vLLM's engine takes any token where all are forbidden, and its grammar none. That, or a grammar
    that takes too long, ends the request as a server's error, which it is not.
    """
    async with aclosing(outputs):
        async for output in outputs:
            for choice in output.outputs:
                if choice.finish_reason == "error":
                    _raise_if_by_grammar(choice.stop_reason, forbidding)
            yield output


def _raise_if_by_grammar(reason: Any, forbidding: list[str]) -> None:
    if reason == SLOW:
        raise failed(_TOO_SLOW, HTTPStatus.BAD_REQUEST)
    if forbidding:
        names = " and ".join(forbidding)
        text = f"{names} and the grammar or schema together allow no token to go on with"
        raise failed(text, HTTPStatus.BAD_REQUEST)


def _check_repetition(params: SamplingParams) -> None:
    detection = getattr(params, "repetition_detection", None)  # which newer versions have
    if detection is None:
        return
    asked = detection.max_pattern_size**2 * detection.min_count
    if asked > REPETITION:
        raise failed(
            f"repetition_detection: the square of max_pattern_size, times min_count, is {asked}, "
            f"and may be {REPETITION}",
            HTTPStatus.BAD_REQUEST,
        )


# Options of vLLM's server that its middleware implements.
_MIDDLEWARE = ("middleware", "enable_request_id_headers", "enable_server_load_tracking")


class Streams:
    """Streamed completions straight from vLLM's handlers, without its HTTP stack in between.

    Every token of a stream passes a dozen layers of middleware there. Requests are parsed and
    answered by the same code of vLLM; whatever is out of the ordinary (an error, an option that a
    middleware implements) is left to the whole application.
    """

    def __init__(self, app: Any, arguments: argparse.Namespace) -> None:
        self._app = app
        self._root = (arguments.root_path or "").rstrip("/")  # which the application takes off too
        plain = not any(getattr(arguments, option, None) for option in _MIDDLEWARE)
        plain = plain and not getattr(arguments, "sse_keep_alive_interval", 0)
        plain = plain and not envs.VLLM_DEBUG_LOG_API_SERVER_RESPONSE
        self._handlers = stream_handlers(app.state) if plain else {}

    async def open(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[str, None] | None:
        """The server-sent events that answer a request; None leaves it to the application."""
        path = scope["path"].removeprefix(self._root)
        found = self._handlers.get(path) if scope["method"] == "POST" else None
        if found is None or b'"stream"' not in body or not _is_plain(scope):
            return None
        parse, answer = found
        try:
            content = json.loads(body)
            if not isinstance(content, dict) or content.get("stream") is not True:
                return None
            request = parse(content)
            raw_request = Request(scope | {"app": self._app})
            events = await answer(request, raw_request)
        except Exception:  # no engine has heard of the request yet
            return None  # the application finds out again, and words the answer
        return events if isinstance(events, AsyncGenerator) else None


def _is_plain(scope: dict[str, Any]) -> bool:
    """JSON, and not from another site's page, which the CORS middleware has to answer."""
    if any(name == b"origin" for name, _ in scope["headers"]):
        return False
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    return [kind.partition(b";")[0].strip().lower() for kind in types] == [b"application/json"]
