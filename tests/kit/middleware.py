"""A middleware as operators write them for vLLM's --middleware: streams end in it unclosed."""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response


async def plain(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Changes nothing."""
    return await call_next(request)
