"""The route of vLLM's demo server, /generate."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from aiohttp import web

from llumnix.engine.vllm.generate import BadRequest, Generation, generate
from llumnix.entrypoints.server.admin import Standing
from llumnix.entrypoints.server.errors import error_response


class DemoRoute:
    """Answers `{"prompt": …, **sampling parameters}` with `{"text": […]}`, streamed on request."""

    def __init__(self, llm: Callable[[], Any], standing: Standing) -> None:
        self._llm = llm
        self._standing = standing

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        llm = self._llm()
        if llm is None or not self._standing.serving:
            return error_response(503, self._standing.sentence)
        try:
            generation = Generation.parse(orjson.loads(await request.read()))
            texts = generate(llm, generation)
            if generation.stream:
                return await _stream(request, texts)
            whole = [text async for text in texts][-1]
            return web.Response(body=_line(whole), content_type="application/json")
        except (BadRequest, orjson.JSONDecodeError) as error:
            return error_response(400, str(error))


async def _stream(request: web.Request, texts: AsyncIterator[list[str]]) -> web.StreamResponse:
    # The first text before the headers: a bad request is found out by then.
    first = await anext(texts)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    await response.write(_line(first))
    async for text in texts:
        await response.write(_line(text))
    await response.write_eof()
    return response


def _line(texts: list[str]) -> bytes:
    return orjson.dumps({"text": texts}, option=orjson.OPT_APPEND_NEWLINE)
