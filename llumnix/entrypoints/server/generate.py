"""The route of vLLM's demo server, /generate."""

import contextlib
from collections.abc import AsyncGenerator, Callable
from http import HTTPStatus

import orjson
from aiohttp import web

from llumnix.engine.vllm.frontend import Frontend
from llumnix.engine.vllm.generate import BadRequest, Failed, Generation, generate
from llumnix.entrypoints.server.admin import Standing
from llumnix.entrypoints.server.errors import RETRY_AFTER, error_response
from llumnix.entrypoints.server.outlet import Outlet


class DemoRoute:
    """Answers `{"prompt": …, **sampling parameters}` with `{"text": […]}`, streamed on request."""

    def __init__(
        self, frontend: Callable[[], Frontend | None], standing: Standing, send_timeout: float
    ) -> None:
        self._frontend = frontend
        self._standing = standing
        self._send_timeout = send_timeout

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        frontend = self._frontend()
        if frontend is None or frontend.llm is None or not self._standing.serving:
            return error_response(503, self._standing.sentence, RETRY_AFTER)
        if not frontend.authorised(request.headers):
            return error_response(401, "wrong or missing API key")
        try:
            generation = Generation.parse(orjson.loads(await request.read()))
            async with contextlib.aclosing(generate(frontend.llm, generation)) as texts:
                if generation.stream:
                    return await _stream(request, texts, self._send_timeout)
                whole = [text async for text in texts][-1]
                return web.Response(body=_line(whole), content_type="application/json")
        except (BadRequest, orjson.JSONDecodeError) as error:
            return error_response(400, str(error))
        except Failed as error:
            again = RETRY_AFTER if error.status == HTTPStatus.SERVICE_UNAVAILABLE else None
            return error_response(error.status, str(error), again)


async def _stream(
    request: web.Request, texts: AsyncGenerator[list[str], None], send_timeout: float
) -> web.StreamResponse:
    # The first text before the headers: a bad request is found out by then.
    first = await anext(texts)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    outlet = Outlet(request, response, send_timeout)
    await outlet.open()
    await outlet.write(_line(first))
    async for text in texts:
        await outlet.write(_line(text))
    await outlet.close()
    return response


def _line(texts: list[str]) -> bytes:
    return orjson.dumps({"text": texts}, option=orjson.OPT_APPEND_NEWLINE)
