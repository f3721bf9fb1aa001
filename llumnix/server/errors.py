"""Errors in the shape of the OpenAI API, for everything that is refused before vLLM sees it."""

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import orjson
from aiohttp import web

from llumnix.server.access_log import shown

logger = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "5"}  # seconds: about what a restart takes
RETRY_SOON = {"Retry-After": "1"}  # seconds: room comes with every request that ends

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class BadContent(Exception):
    """A body that asks for too much; the message says what, `field` where."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def error_response(
    status: int, message: str, headers: dict[str, str] | None = None, param: str | None = None
) -> web.Response:
    """One clear sentence, the right status, and the body that OpenAI clients expect.

    `param` is the field of the request's body that is at fault, if it is one.
    """
    kind = "".join(word.capitalize() for word in HTTPStatus(status).phrase.split())
    kind = kind if kind.endswith("Error") else f"{kind}Error"
    error = {"message": message, "type": kind, "param": param, "code": status}
    return web.Response(
        body=orjson.dumps({"error": error}),
        status=status,
        content_type="application/json",
        headers=headers,
    )


async def elsewhere(request: web.Request) -> web.StreamResponse:
    """The answer to a node that wants a link where clients are served."""
    return error_response(404, "the links of nodes have an address of their own here")


@web.middleware
async def openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn aiohttp's own refusals, and bugs, into OpenAI-shaped errors."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return cut(request) if has_begun(request) else _refusal(request, error)
    except Exception as error:
        if request.transport is None or request.transport.is_closing():
            return web.Response(status=499, reason="Client Closed Request")  # it never arrives
        logger.exception("%s %s failed", shown(request.method), shown(request.path))
        if has_begun(request):
            return cut(request)
        if isinstance(error, TimeoutError):
            return error_response(504, "the request took too long")
        return error_response(500, "internal error; the server's log has the details")


def _refusal(request: web.Request, error: web.HTTPException) -> web.Response:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request._client_max_size
        text = f"the request body is larger than the limit of {limit} bytes"
        return error_response(error.status, text)
    return error_response(error.status, error.text or error.reason)


def has_begun(request: web.Request) -> bool:
    """Whether something of the answer, were it only its headers, is on its way."""
    return request.writer.output_size > 0


def cut(request: web.Request) -> web.Response:
    """End an answer that has begun so that its client sees it broken off, not complete."""
    if request.transport is not None:
        request.transport.close()
    return web.Response(status=500)  # for the access log; it never arrives
