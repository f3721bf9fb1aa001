"""The X-Request-Id of what a node answers itself, as vLLM's application gives it to its own."""

import uuid

from aiohttp import web

HEADER = "X-Request-Id"


async def give_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Send the client's id back, or a new one; for vLLM's --enable-request-id-headers."""
    if HEADER not in response.headers:
        response.headers[HEADER] = request.headers.get(HEADER) or uuid.uuid4().hex
