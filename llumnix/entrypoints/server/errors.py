"""Errors in the shape of the OpenAI API, for everything that is refused before vLLM sees it."""

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import orjson
from aiohttp import web

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_response(
    status: int, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    """One clear sentence, the right status, and the body that OpenAI clients expect."""
    kind = "".join(word.capitalize() for word in HTTPStatus(status).phrase.split())
    kind = kind if kind.endswith("Error") else f"{kind}Error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.Response(
        body=orjson.dumps({"error": error}),
        status=status,
        content_type="application/json",
        headers=headers,
    )


@web.middleware
async def openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn aiohttp's own refusals, and bugs, into OpenAI-shaped errors."""
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge as error:
        limit = request._client_max_size
        text = f"the request body is larger than the limit of {limit} bytes"
        return error_response(error.status, text)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_response(error.status, error.text or error.reason)
    except ConnectionError:
        return web.Response(status=499, reason="Client Closed Request")  # it never arrives
    except TimeoutError:
        raise  # the client is gone
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return error_response(500, "internal error; the server's log has the details")
