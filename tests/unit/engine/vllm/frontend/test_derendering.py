"""Streamed outputs that vLLM parses anew with each piece: not for ever, nor at the cost of all."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.scale_out.derender.serving import ServingDerender
from vllm.entrypoints.scale_out.token_in_token_out.protocol import DerenderChatStreamRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers.online_derenderer import OnlineDerenderer

from llumnix.engine.vllm.frontend import derendering
from tests.kit.loop import on_loop

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}


class Server:
    """vLLM's own parts behind the route, over a real tokenizer."""

    def __init__(self, model: str, parser: str | None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.thread = ThreadPoolExecutor(1)
        config = EngineArgs(model=model).create_model_config()
        renderer: Any = SimpleNamespace(
            tokenizer=self.tokenizer, get_tokenizer=lambda: self.tokenizer, _executor=self.thread
        )
        options: dict[str, Any] = {
            "request_logger": None,
            "chat_template": None,
            "chat_template_content_format": "auto",
        }
        derenderer = OnlineDerenderer(
            config, renderer, **options, enable_auto_tools=True, tool_parser=parser
        )
        models: Any = SimpleNamespace(model_config=config, model_name=lambda: "m")
        self.serving = ServingDerender(models, derenderer)
        self.state = SimpleNamespace(serving_derender=self.serving)

    async def derender(self, text: str) -> Any:
        """The last piece of it, after one for each of the tokens before."""
        tokens = self.tokenizer.encode(text)
        request = {
            "stream": True,
            "generate_chunk": {
                "request_id": "r",
                "choices": [{"index": 0, "token_ids": tokens[-1:]}],
            },
            "stream_state": {
                "output_token_ids": tokens[:-1],
                "output_chunk_lens": [1] * (len(tokens) - 1),
            },
            "prompt_token_ids": [1],
            "chat_request": CHAT,
        }
        parsed = DerenderChatStreamRequest.model_validate(request)
        return await self.serving.derender_chat_stream_response(parsed)


@on_loop
async def test_hundreds_of_tool_calls_hold_nobody_up_for_long(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derendering, "SECONDS", 0.2)
    server = Server(model, "pythonic")
    derendering.bound_derendering(server.state)
    # For whoever comes right behind it, as a prompt to be tokenised.
    spent: list[float] = []
    answer = server.serving.derender_chat_stream_response
    began = server.thread.submit(time.thread_time).result()
    error = await server.derender("[" + ", ".join(["f(a='b')"] * 300) + "]")
    spent.append(server.thread.submit(time.thread_time).result() - began)
    assert isinstance(error, ErrorResponse) and error.error.code == 400
    assert "longer than 0.2 s to parse" in error.error.message
    assert spent[0] < 1.5, "where it takes tens of seconds"
    assert answer is server.serving.derender_chat_stream_response
    # What is wrong in other ways is answered as ever, and what is right.
    chunk, state = await server.derender("[f(a='b')]")
    assert chunk.choices[0].delta.role == "assistant" and len(state.output_chunk_lens) > 3
    server.thread.shutdown()


@on_loop
async def test_plain_outputs_are_left_alone(model: str) -> None:
    server = Server(model, None)
    before = server.serving.derender_chat_stream_response
    derendering.bound_derendering(server.state)
    derendering.bound_derendering(SimpleNamespace())
    assert server.serving.derender_chat_stream_response == before
    chunk, _ = await server.derender("Hello, world")
    assert chunk.choices[0].delta.content
    server.thread.shutdown()
