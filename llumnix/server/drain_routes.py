"""The route by which operators have a node or an instance emptied, and see what is left there."""

from typing import Any

import orjson
from aiohttp import web

from llumnix.cluster import ClusterView
from llumnix.server.errors import RETRY_AFTER, error_response
from llumnix.server.operations import OperationError, Operations
from llumnix.server.status_routes import json_response


class Drains:
    """Begins and cancels drains, and lists those there are."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def list(self, request: web.Request) -> web.Response:
        """What is drained, each with the requests that are left there."""
        try:
            requests = await self._operations.requests()
        except OperationError as error:
            return refusal(error)
        view = self._operations.view()
        return json_response([left(view, name, requests) for name in sorted(view.draining)])

    async def drain(self, request: web.Request) -> web.Response:
        """Have `name` emptied, or no more with `cancel`; answers at once with what is left there.

        404 for a name that is neither a node nor an instance, 503 while etcd does not answer.
        """
        try:
            body = orjson.loads(await request.read())
            name, cancel = body["name"], body.get("cancel", False)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            return error_response(400, 'the body must be JSON: {"name": …, "cancel": false}')
        if not isinstance(name, str) or not isinstance(cancel, bool):
            return error_response(400, "name must be a string, and cancel true or false")
        if (problem := unknown(self._operations.view(), name, cancel)) is not None:
            return error_response(404, problem)
        try:
            await self._operations.drain(name, cancel)
            requests = await self._operations.requests()
        except OperationError as error:
            return refusal(error)
        found = left(self._operations.view(), name, requests)
        return json_response(found | {"drained": not cancel})


def refusal(error: OperationError) -> web.Response:
    """The answer that tells an operator why it can't be; 503 may be asked again."""
    again = RETRY_AFTER if error.status == 503 else None
    return error_response(error.status, str(error), again)


def unknown(view: ClusterView, name: str, cancel: bool) -> str | None:
    """A sentence if there is nothing of that name to drain, or to cancel the drain of."""
    if cancel:
        drained = ", ".join(sorted(view.draining)) or "nothing"
        return None if name in view.draining else f"{name} is not drained; drained is {drained}"
    if name in view.nodes or name in view.instances:
        return None
    return (
        f"there is no node or instance {name}; there are the nodes "
        f"{', '.join(sorted(view.nodes))} and the instances "
        f"{', '.join(sorted(view.instances)) or 'none'}"
    )


def left(view: ClusterView, name: str, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """What is left at a node or an instance: the ids of its requests, and why some can't move."""
    here = [one for one in requests if name in (one["node"], one["instance"])]
    loads = (load for i, load in view.loads.items() if i in view.instances)
    reported = sum(
        load.running + load.waiting
        for load in loads
        if name in (load.instance, view.instances[load.instance].node)
    )
    return {
        "name": name,
        "kind": "node" if name in view.nodes else "instance",
        "drained": name in view.draining,
        # A node that does not answer lists none of its requests.
        "left": len(here) or reported,
        "requests": [one["id"] for one in here],
        "stuck": {one["id"]: one["stuck"] for one in here if one["stuck"]},
    }
