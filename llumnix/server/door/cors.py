"""Lets pages of other sites read what a node answers itself, as vLLM's application does its own."""

import argparse

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware


def allow_origins(arguments: argparse.Namespace) -> Middleware:
    """The middleware for vLLM's --allowed-origins and --allow-credentials."""
    origins, credentials = frozenset(arguments.allowed_origins), arguments.allow_credentials

    @web.middleware
    async def allow(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        given = request.headers.getall(hdrs.ORIGIN, ())
        origin = given[0] if len(given) == 1 else None  # no browser sends several
        allowed = origin is not None and ("*" in origins or origin in origins)
        headers = response.headers
        if not allowed or response.prepared or hdrs.ACCESS_CONTROL_ALLOW_ORIGIN in headers:
            return response
        if "*" in origins and not credentials:
            headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*"
        else:
            headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = str(origin)
            headers.add(hdrs.VARY, hdrs.ORIGIN)
        if credentials:
            headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"
        return response

    return allow
