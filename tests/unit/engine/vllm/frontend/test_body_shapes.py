"""Long lists of wrong items are refused at the first of them."""

import functools
import time
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, model_validator
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from llumnix.engine.vllm.frontend.body_shapes import Shapes
from tests.kit.loop import on_loop

GOOD = {"role": "user", "content": "x"}


@functools.cache
def shapes() -> Shapes:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: ChatCompletionRequest) -> None: ...

    @app.post("/v1/responses")
    async def responses(request: ResponsesRequest) -> None: ...

    @app.post("/v1/messages")
    async def messages(request: AnthropicMessagesRequest) -> None: ...

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> None: ...

    return Shapes(app, "/api/")


@pytest.mark.parametrize("wrong", [{}, 1, GOOD | {"content": 1}, GOOD | {"name": 1}])
@on_loop
async def test_the_first_wrong_item_is_enough(wrong: Any) -> None:
    seen = shapes()
    began = time.thread_time()
    problem = await seen.problem("/api/v1/chat/completions", {"messages": [GOOD, wrong] * 2000})
    assert problem is not None and problem.startswith("messages[1] is not")
    assert time.thread_time() - began < 0.3  # some ms on a machine of one's own; else 0.5 s
    assert await seen.problem("/v1/chat/completions", {"messages": [GOOD] * 2000}) is None


@on_loop
async def test_what_is_left_to_the_model() -> None:
    seen = shapes()
    for content in ({"messages": [{}] * 128}, {"messages": "x"}, {"input": [1] * 99}, [], None):
        assert await seen.problem("/v1/chat/completions", content) is None
    assert await seen.problem("/v1/embeddings", {"messages": [{}] * 99}) is None
    assert await seen.problem("/v1/responses", {"input": "x" * 99}) is None
    assert await seen.problem("/v1/responses", {"input": [1] * 199}) is not None
    assert await seen.problem("/v1/responses", {"input": [GOOD] * 99}) is None


KEYS = {str(n): [] for n in range(16_000)}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
ITEMS = [{}] * 16_000
ASSISTANT = {"type": "message", "role": "assistant"}
TEXT = {"type": "output_text"}
RESULTS = {"type": "tool_result", "content": [1] * 256}


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/responses", "input", KEYS),
        ("/v1/responses", "input", [GOOD | {"content": ITEMS[:256]}]),
        ("/v1/responses", "input", [{"content": ITEMS[:32], "summary": ITEMS[:32]}] * 32),
        ("/v1/responses", "input", [ASSISTANT | {"content": [TEXT | {"annotations": [1] * 256}]}]),
        (
            "/v1/responses",
            "input",
            [ASSISTANT | {"content": [TEXT | {"annotations": ITEMS[:99]}] * 99}],
        ),
        ("/v1/responses", "input", [dict.fromkeys(map(str, range(256)), 1) | ASSISTANT] * 31),
        ("/v1/responses", "previous_input_messages", [1] * 16_000),
        ("/v1/responses", "tools", ITEMS),
        ("/v1/responses", "tools", KEYS),
        ("/v1/responses", "include", ["x"] * 16_000),
        ("/v1/chat/completions", "messages", KEYS),
        ("/v1/chat/completions", "tools", ITEMS),
        ("/v1/chat/completions", "tool_choice", ["a"] * 30_000),
        ("/v1/chat/completions", "stop", ITEMS),
        ("/v1/chat/completions", "stop", KEYS),
        ("/v1/chat/completions", "vllm_xargs", {"tools": ITEMS}),
        ("/v1/completions", "prompt", ITEMS),
        ("/v1/completions", "prompt", [[1, "x"]] * 8_000),
        ("/v1/completions", "structured_outputs", []),
        ("/v1/messages", "system", ITEMS),
        ("/v1/messages", "system", KEYS),
        ("/v1/messages", "messages", ITEMS),
        ("/v1/messages", "messages", [{"role": "user", "content": [RESULTS] * 180}]),
        ("/v1/messages", "tools", ITEMS),
        ("/v1/messages", "tool_choice", ["a"] * 60_000),
    ],
)
@on_loop
async def test_what_a_model_would_tell_much_of_is_refused_at_its_first_error(
    path: str, field: str, value: Any
) -> None:
    seen = shapes()
    began = time.process_time()
    problem = await seen.problem(path, {"model": "m", field: value})
    assert problem is not None and problem.startswith(field)
    # Some ms; an object of 16,000 keys took 13 s, and lists within lists within lists 22 s.
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/responses", "tools", [TOOL] * 99),
        ("/v1/responses", "previous_input_messages", [{"anything": 1}] * 99),
        ("/v1/chat/completions", "stop", "x"),
        ("/v1/chat/completions", "messages", [GOOD] * 99),
        ("/v1/chat/completions", "vllm_xargs", {"a": [1, "x", 0.5] * 99}),
        ("/v1/completions", "prompt", [1] * 1000),
        ("/v1/completions", "prompt", [[1] * 99] * 99),
        ("/v1/completions", "prompt", ["x"] * 99),
        ("/v1/completions", "logit_bias", {str(n): 1 for n in range(99)}),
        ("/v1/messages", "system", [{"type": "text", "text": "x"}] * 99),
        ("/v1/messages", "tools", [{"name": "f", "input_schema": {"type": "object"}}] * 99),
    ],
)
@on_loop
async def test_what_is_right_passes_however_long(path: str, field: str, value: Any) -> None:
    assert await shapes().problem(path, {"model": "m", field: value}) is None


@on_loop
async def test_what_a_model_mends_is_not_refused() -> None:
    """The model of responses gives a call and a thought the ids that a client has left out."""
    part = {"type": "output_text", "text": "x"}
    said = {"type": "message", "role": "assistant", "content": [part]}
    thought = {"type": "reasoning", "summary": []}
    content: dict[str, Any] = {"model": "m", "input": [GOOD, said, thought] * 20}
    ResponsesRequest.model_validate(content)
    assert await shapes().problem("/v1/responses", content) is None
    content["input"].append(said | {"content": [part] * 256})
    assert await shapes().problem("/v1/responses", content) is None
    content["input"].append(said | {"content": [part] * 255 + [1]})
    problem = await shapes().problem("/v1/responses", content)
    assert problem is not None and problem.startswith("input[61] is not")


class Again(BaseModel):
    """A model whose validator makes another of its own, as one of vLLM's for many chats does."""

    model: str
    items: list[list[int]] = []

    @model_validator(mode="before")
    @classmethod
    def _first(cls, data: Any) -> Any:
        return data if not isinstance(data.get("only"), list) else dict(Again(items=data["only"]))


@on_loop
async def test_a_model_that_makes_itself() -> None:
    app = FastAPI()

    @app.post("/again")
    async def again(request: Again) -> None: ...

    seen = Shapes(app, "")
    assert await seen.problem("/again", {"model": "m", "items": [[1] * 99] * 99}) is None
    problem = await seen.problem("/again", {"model": "m", "items": [[1] * 99] * 50 + [["x"] * 99]})
    assert problem is not None and problem.startswith("items[50] is not")
