"""Streamed completions straight from vLLM's handlers, without its HTTP stack in between.

Every token of a stream passes a dozen layers of middleware there. Requests are parsed and answered
by the same code of vLLM; whatever is out of the ordinary (an error, an option that a middleware
implements) is left to the whole application.
"""

import argparse
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from vllm import envs

from llumnix.engine.vllm.compat import stream_handlers

# Options of vLLM's server that its middleware implements.
_MIDDLEWARE = ("middleware", "enable_request_id_headers", "enable_server_load_tracking")


class Streams:
    """The routes that stream tokens."""

    def __init__(self, app: Any, arguments: argparse.Namespace) -> None:
        self._app = app
        self._root = (arguments.root_path or "").rstrip("/")  # which the application takes off too
        plain = not any(getattr(arguments, option, None) for option in _MIDDLEWARE)
        plain = plain and not getattr(arguments, "sse_keep_alive_interval", 0)
        plain = plain and not envs.VLLM_DEBUG_LOG_API_SERVER_RESPONSE
        self._handlers = stream_handlers(app.state) if plain else {}

    async def open(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[str, None] | None:
        """The server-sent events that answer a request; None leaves it to the application."""
        path = scope["path"].removeprefix(self._root)
        found = self._handlers.get(path) if scope["method"] == "POST" else None
        if found is None or b'"stream"' not in body or not _is_plain(scope):
            return None
        parse, answer = found
        try:
            content = json.loads(body)
            if not isinstance(content, dict) or content.get("stream") is not True:
                return None
            request = parse(content)
            raw_request = Request(scope | {"app": self._app})
            events = await answer(request, raw_request)
        except Exception:  # no engine has heard of the request yet
            return None  # the application finds out again, and words the answer
        return events if isinstance(events, AsyncGenerator) else None


def _is_plain(scope: dict[str, Any]) -> bool:
    """JSON, and not from another site's page, which the CORS middleware has to answer."""
    if any(name == b"origin" for name, _ in scope["headers"]):
        return False
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    return [kind.partition(b";")[0].strip().lower() for kind in types] == [b"application/json"]
