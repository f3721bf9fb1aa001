"""The route of vLLM's demo server, /generate."""

import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from vllm.v1.engine.async_llm import AsyncLLM

from llumnix.engine.vllm.frontend.generate import BadRequest, Failed, Generation, generate
from llumnix.server.errors import RETRY_AFTER, cut, error_response, has_begun
from llumnix.server.frontend import Frontend
from llumnix.server.response_stream import Outlet
from llumnix.server.status_routes import Standing


class DemoRoute:
    """Answers `{"prompt": …, **sampling parameters}` with `{"text": […]}`, streamed on request."""

    def __init__(
        self,
        frontend: Callable[[], Frontend | None],
        standing: Standing,
        answering: Callable[[web.Request], AbstractContextManager[Any]],
    ) -> None:
        """`answering`: the context in which a request counts as one that is being answered."""
        self._frontend = frontend
        self._standing = standing
        self._answering = answering

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        frontend = self._frontend()
        if frontend is None or frontend.llm is None or not self._standing.admits:
            return error_response(503, self._standing.sentence, RETRY_AFTER)
        body = await request.read()
        try:
            with self._answering(request):
                return await self._answer(request, frontend.llm, Generation.parse(_read(body)))
        except BadRequest as error:
            refusal = error_response(400, str(error))
        except Failed as error:
            again = RETRY_AFTER if error.status == HTTPStatus.SERVICE_UNAVAILABLE else None
            refusal = error_response(error.status, str(error), again)
        return cut(request) if has_begun(request) else refusal

    async def _answer(
        self, request: web.Request, llm: AsyncLLM, generation: Generation
    ) -> web.StreamResponse:
        async with contextlib.aclosing(generate(llm, generation)) as texts:
            if generation.stream:
                return await _stream(request, texts)
            whole = [text async for text in texts][-1]
            return web.Response(body=_line(whole), content_type="application/json")


def _read(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(str(error)) from error


async def _stream(
    request: web.Request, texts: AsyncGenerator[list[str], None]
) -> web.StreamResponse:
    # The first text before the headers: a bad request is found out by then.
    first = await anext(texts)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    outlet = Outlet(request, response)
    await outlet.open()
    await outlet.write(_line(first))
    async for text in texts:
        await outlet.write(_line(text))
    await outlet.close()
    return response


def _line(texts: list[str]) -> bytes:
    return orjson.dumps({"text": texts}, option=orjson.OPT_APPEND_NEWLINE)
