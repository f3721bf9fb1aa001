"""The routes by which operators see requests and move them."""

import orjson
from aiohttp import web

from llumnix.server.errors import error_response
from llumnix.server.operations import OperationError, Operations
from llumnix.server.status_routes import json_response


class Moves:
    """Lists the cluster's requests, and moves one by hand."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def requests(self, request: web.Request) -> web.Response:
        """All requests of the cluster, running and waiting."""
        try:
            return json_response(await self._operations.requests())
        except OperationError as error:
            return error_response(error.status, str(error))

    async def migrate(self, request: web.Request) -> web.Response:
        """Move `request` to the instance `to`; answers when it has moved, or why it has not.

        404 for an unknown request or instance, 409 if it goes on where it is.
        """
        try:
            body = orjson.loads(await request.read())
            request_id, destination = body["request"], body["to"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return error_response(400, 'the body must be JSON: {"request": …, "to": …}')
        if not (isinstance(request_id, str) and isinstance(destination, str) and request_id):
            return error_response(400, "request and to must be strings")
        try:
            return json_response(await self._operations.migrate(request_id, destination))
        except OperationError as error:
            return error_response(error.status, str(error))
