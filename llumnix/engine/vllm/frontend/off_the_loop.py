"""Work of vLLM's handlers that the event loop would do in one piece, in pieces or in a thread.

Nothing of it has a setting or a place of its own in vLLM. Versions that keep it elsewhere do it as
they do.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import orjson
import torch
from pydantic_core import SchemaValidator
from starlette.responses import Response, StreamingResponse

from llumnix.engine.vllm.frontend.first_errors import lists_stopping

NUMBERS = 16_384  # of an answer, which are encoded in one piece: a millisecond
_AT_ONCE = 16 * NUMBERS  # of an answer that is sent in one piece

# Who answers with numbers, by which method, and in which field of each item.
_ANSWERS = (
    ("serving_pooling", "request_output_to_pooling_json_response", "data"),
    ("serving_embedding", "_openai_json_response", "embedding"),
)


def spare_the_loop(app: Any) -> None:
    """Have this application of vLLM's do less on its loop; it answers what it would."""
    _stop_at_wrong_lists(app)
    _tokenize_in_its_thread(getattr(app.state, "serving_generative_scoring", None))
    for name, method, field in _ANSWERS:
        _encode_in_pieces(getattr(app.state, name, None), method, field)


def _stop_at_wrong_lists(app: Any) -> None:
    """Have bodies that may be of several models looked at by validators that stop early.

    To find the right one, pydantic tries them all, and for each item of a list all ways in which
    it is wrong: 97,000 token ids to embed took two seconds, as each is no message of a chat.
    """
    for route in app.routes:
        for body in getattr(getattr(route, "dependant", None), "body_params", ()):
            adapter = getattr(body, "_type_adapter", None)
            several = getattr(body.field_info.annotation, "__args__", None)
            if adapter is None or several is None:
                continue
            schema = lists_stopping(adapter.core_schema)
            adapter.validator = SchemaValidator(schema, _use_prebuilt=False)


def _tokenize_in_its_thread(serving: Any) -> None:
    """Have a generative scoring's texts tokenised by the thread that tokenises all prompts.

    vLLM does it in its handler's coroutine, about a megabyte in a second.
    """
    build = getattr(serving, "_build_prompts", None)
    executor = getattr(getattr(serving, "renderer", None), "_executor", None)
    if build is None or executor is None or not asyncio.iscoroutinefunction(build):
        return

    @functools.wraps(build)
    async def in_a_thread(*args: Any, **kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, _ran, build, args, kwargs)

    serving._build_prompts = in_a_thread


def _ran(function: Callable[..., Coroutine[Any, Any, Any]], args: Any, kwargs: Any) -> Any:
    """What a coroutine returns that waits for nothing, or for what another loop may have."""
    return asyncio.run(function(*args, **kwargs))


def _encode_in_pieces(serving: Any, method: str, field: str) -> None:
    """Have the numbers of a pooling's answer encoded some at a time, by the thread that makes it.

    vLLM has them listed, checked, copied and encoded whole. Its thread has Python's interpreter
    for as long: half a second for the 2,000,000 of a prompt of 3,500 tokens. These are of the same
    value, if shorter: 0.1 where it writes 0.10000000149011612.
    """
    answer = getattr(serving, method, None)
    if answer is None or "encoding_format" not in inspect.signature(answer).parameters:
        return
    bind = inspect.signature(answer).bind

    @functools.wraps(answer)
    def in_pieces(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if bind(outputs, *args, **kwargs).arguments["encoding_format"] != "float":
            return answer(outputs, *args, **kwargs)
        without = [
            SimpleNamespace(prompt_token_ids=output.prompt_token_ids, outputs=_NO_NUMBERS)
            for output in outputs
        ]
        said = orjson.loads(answer(without, *args, **kwargs).body)
        for item in said["data"]:
            item[field] = _PLACE
        numbers = [output.outputs.data for output in outputs]
        pieces = _spliced(orjson.dumps(said).split(_NUL), numbers)
        if (
            sum(data.numel() for data in numbers) > _AT_ONCE
        ):  # each in a thread, when it is its turn
            return StreamingResponse(pieces, media_type="application/json")
        return Response(b"".join(pieces), media_type="application/json")

    setattr(serving, method, in_pieces)


_NUL = b"\0"
_PLACE = orjson.Fragment(_NUL)  # no sign of JSON, where it is written as \\u0000
_NO_NUMBERS = SimpleNamespace(data=torch.empty(0))


def _spliced(around: list[bytes], numbers: list[torch.Tensor]) -> Iterator[bytes]:
    for text, data in zip(around, numbers, strict=False):
        yield text
        yield from _encoded(data)
    yield around[-1]


def _encoded(numbers: torch.Tensor) -> Iterator[bytes]:
    """A tensor as JSON, some numbers at a time."""
    if not numbers.numel():
        yield orjson.dumps(numbers.tolist())
        return
    if numbers.dtype in (torch.bfloat16, torch.float16):
        numbers = numbers.float()
    array = numbers.contiguous().numpy()
    rows = max(1, NUMBERS * len(array) // array.size)
    for start in range(0, len(array), rows):
        piece = orjson.dumps(array[start : start + rows], option=orjson.OPT_SERIALIZE_NUMPY)
        yield (b"," if start else b"[") + piece[1:-1]
    yield b"]"
