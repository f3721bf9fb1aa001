"""Long lists of wrong items are refused at the first of them."""

import time
from typing import Any

import pytest
from fastapi import FastAPI
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from llumnix.engine.vllm.list_shapes import Shapes
from tests.kit.loop import on_loop

GOOD = {"role": "user", "content": "x"}


def shapes() -> Shapes:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: ChatCompletionRequest) -> None: ...

    @app.post("/v1/responses")
    async def responses(request: ResponsesRequest) -> None: ...

    return Shapes(app, "/api/")


@pytest.mark.parametrize("wrong", [{}, 1, GOOD | {"content": 1}, GOOD | {"name": 1}])
@on_loop
async def test_the_first_wrong_item_is_enough(wrong: Any) -> None:
    seen = shapes()
    began = time.perf_counter()
    problem = await seen.problem("/api/v1/chat/completions", {"messages": [GOOD, wrong] * 2000})
    assert problem is not None and problem.startswith("messages[1] is not")
    assert time.perf_counter() - began < 0.3  # some ms on a machine of one's own; else 0.5 s
    assert await seen.problem("/v1/chat/completions", {"messages": [GOOD] * 2000}) is None


@on_loop
async def test_what_is_left_to_the_model() -> None:
    seen = shapes()
    for content in ({"messages": [{}] * 32}, {"messages": "x"}, {"input": [1] * 99}, [], None):
        assert await seen.problem("/v1/chat/completions", content) is None
    assert await seen.problem("/v1/completions", {"messages": [{}] * 99}) is None
    assert await seen.problem("/v1/responses", {"input": "x" * 99}) is None
    assert await seen.problem("/v1/responses", {"input": [1] * 99}) is not None
    assert await seen.problem("/v1/responses", {"input": [GOOD] * 99}) is None
