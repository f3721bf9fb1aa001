"""What vLLM's handlers do in pieces or in a thread, and that they answer the same."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
from vllm.entrypoints.pooling.pooling.serving import ServingPooling
from vllm.entrypoints.pooling.utils import get_json_response_cls

from llumnix.engine.vllm.frontend import off_the_loop
from llumnix.engine.vllm.frontend.off_the_loop import spare_the_loop
from tests.kit.loop import on_loop

IDS = {"model": "m", "input": [[5] * 190] * 128}


@pytest.fixture
def app() -> Iterator[Any]:
    """An application with a route that takes several kinds of bodies."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embed(request: EmbeddingRequest) -> Any:
        return {"kind": type(request).__name__, "input": getattr(request, "input", None)}

    made = FastAPI()
    made.include_router(router)
    spare_the_loop(made)
    yield made


def test_a_body_that_may_be_of_many_kinds(app: Any) -> None:
    """Half a second for these ids, as each was no message of a chat in so many ways."""
    with TestClient(app) as client:
        began = time.process_time()
        answer = client.post("/v1/embeddings", json=IDS)
        assert time.process_time() - began < 0.25
        assert answer.json() == {"kind": "EmbeddingCompletionRequest", "input": IDS["input"]}
        talk = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        for right, kind in (
            ({"model": "m", "input": "x"}, "EmbeddingCompletionRequest"),
            ({"model": "m", "input": [1, 2]}, "EmbeddingCompletionRequest"),
            (talk, "EmbeddingChatRequest"),
        ):
            assert client.post("/v1/embeddings", json=right).json()["kind"] == kind
        wrong = client.post("/v1/embeddings", json={"model": "m", "input": [[5, "x"]] * 128})
        assert wrong.status_code == 422 and len(wrong.content) < 20_000


def answer_of(serving: Any, method: str, outputs: list[Any], kind: str) -> Any:
    """An answer that a real handler of vLLM's makes of these outputs."""
    answer = getattr(serving, method)(outputs, "r1", 7, "m", kind, "float32", "native")
    app = FastAPI()
    app.add_api_route("/", lambda: answer)
    with TestClient(app) as client:
        said = client.get("/")
    assert said.status_code == 200 and said.headers["content-type"] == "application/json"
    return said.json()


def outputs_of(*data: torch.Tensor) -> list[Any]:
    return [
        SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=SimpleNamespace(data=each))
        for each in data
    ]


CASES = {
    "serving_pooling": (ServingPooling, "request_output_to_pooling_json_response", "data"),
    "serving_embedding": (ServingEmbedding, "_openai_json_response", "embedding"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_in_pieces(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(off_the_loop, "NUMBERS", 20)
    kind, method, field = CASES[name]
    torch.manual_seed(0)
    data = [torch.randn(9, dtype=dtype), torch.randn(70, dtype=dtype), torch.randn(0, dtype=dtype)]
    if name == "serving_pooling":
        data += [torch.randn(11, 6, dtype=dtype), torch.randn(3, 50, dtype=dtype).T]
    outputs = outputs_of(*data)
    serving = kind.__new__(kind)
    serving.json_response_cls = get_json_response_cls()
    floats = [torch.tensor(each.tolist()) for each in data]
    before = {form: answer_of(serving, method, outputs, form) for form in ("float", "base64")}
    spare_the_loop(SimpleNamespace(routes=[], state=SimpleNamespace(**{name: serving})))
    after = {form: answer_of(serving, method, outputs, form) for form in ("float", "base64")}
    assert before["base64"] == after["base64"]
    for item, numbers in zip(after["float"]["data"], floats, strict=True):
        assert torch.equal(torch.tensor(item.pop(field)), numbers)
    for item in before["float"]["data"]:
        del item[field]
    assert before["float"] == after["float"], "all but the numbers is what vLLM says"


def test_no_piece_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two million numbers held Python's interpreter for a third of a second in one piece."""
    serving = ServingPooling.__new__(ServingPooling)
    serving.json_response_cls = get_json_response_cls()
    spare_the_loop(SimpleNamespace(routes=[], state=SimpleNamespace(serving_pooling=serving)))
    pieces: list[int] = []

    class Orjson:
        loads, Fragment = orjson.loads, orjson.Fragment
        OPT_SERIALIZE_NUMPY = orjson.OPT_SERIALIZE_NUMPY

        @staticmethod
        def dumps(value: Any, *args: Any, **kwargs: Any) -> bytes:
            pieces.append(getattr(value, "size", 0))
            return orjson.dumps(value, *args, **kwargs)

    monkeypatch.setattr(off_the_loop, "orjson", Orjson)
    outputs = outputs_of(torch.randn(3500, 576))
    said = answer_of(serving, CASES["serving_pooling"][1], outputs, "float")
    assert sum(pieces) == 3500 * 576 and max(pieces) <= off_the_loop.NUMBERS
    assert len(said["data"][0]["data"]) == 3500


@on_loop
async def test_a_scoring_is_tokenised_in_the_thread_of_all_prompts() -> None:
    seen: list[str] = []

    def encode(text: str, **options: Any) -> list[int]:
        seen.append(threading.current_thread().name)
        return [len(text)]

    serving = ServingGenerativeScoring.__new__(ServingGenerativeScoring)
    with ThreadPoolExecutor(1, "tokens") as executor:
        serving.renderer = SimpleNamespace(_executor=executor)
        state = SimpleNamespace(serving_generative_scoring=serving)
        spare_the_loop(SimpleNamespace(routes=[], state=state))
        request: Any = SimpleNamespace(
            query="abc", items=["d", "ef"], add_special_tokens=True, item_first=False
        )
        request.cache_salt = None
        tokenizer: Any = SimpleNamespace(encode=encode)
        prompts, counts = await serving._build_prompts(request, tokenizer, 100)
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [[3, 1], [3, 2]]
    assert counts == [2, 2]
    assert seen and all(name.startswith("tokens") for name in seen)
