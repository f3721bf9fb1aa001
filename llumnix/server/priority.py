"""The priority of a request, as a header says it: a class by its name, or vLLM's number."""

import re
from contextvars import ContextVar

from aiohttp import web
from vllm.v1.engine import EngineCoreRequest

from llumnix.policy.priority_classes import PRIORITIES, Classes
from llumnix.server.errors import Handler, error_response

HEADER = "X-Llumnix-Priority"
_NUMBER = re.compile(r"[+-]?[0-9]{1,19}")

# Set in the handler's task, and so in all tasks that vLLM makes of it.
_asked: ContextVar[int | None] = ContextVar("priority", default=None)


class Priorities:
    """Gives requests the priority of their HTTP request's header, whatever route they came by.

    It counts before a `priority` in the body, as vLLM's own header does: so a proxy in front can
    say what its clients get.
    """

    def __init__(self, classes: Classes) -> None:
        self._by_name = {made.name: made.priority for made in classes.by_priority.values()}

    def guard(self, handler: Handler) -> Handler:
        """The handler, with 400 in its place for a header that names no priority."""

        async def ask(request: web.Request) -> web.StreamResponse:
            text = request.headers.get(HEADER)
            if text is None:
                return await handler(request)
            try:
                _asked.set(self._parse(text))
            except ValueError as error:
                return error_response(400, str(error))
            try:
                return await handler(request)
            finally:
                _asked.set(None)  # the next request of this connection has the same task

        return ask

    @staticmethod
    def enter(request: EngineCoreRequest) -> None:
        """Set the priority of a request of the handler that this is called from."""
        asked = _asked.get()
        if asked is not None:
            request.priority = asked

    def _parse(self, text: str) -> int:
        if text in self._by_name:
            return self._by_name[text]
        if _NUMBER.fullmatch(text) and int(text) in PRIORITIES:
            return int(text)
        names = f"one of {', '.join(self._by_name)} or " if self._by_name else ""
        raise ValueError(f"{HEADER} must be {names}a whole number of 64 bits, not {text!r}")
