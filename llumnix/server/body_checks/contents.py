"""What a body asks for, looked at before vLLM parses it: how many requests, how much of what."""

import json
from contextvars import ContextVar
from typing import Any

import orjson
from aiohttp import web

from llumnix.engine.vllm.frontend.media_budgets import MediaBudget, MediaRoom, media_budget
from llumnix.engine.vllm.grammars.checks import asker
from llumnix.metrics import REFUSALS
from llumnix.server.body_checks import limits
from llumnix.server.body_checks.binary_fields import NOTHING, Taken, check_binary_fields
from llumnix.server.body_checks.fields import weigh
from llumnix.server.body_checks.forms import check_form, form_fields
from llumnix.server.body_checks.json_scan import TooMuch, refuse_halves, scan
from llumnix.server.body_checks.json_strings import check_strings
from llumnix.server.body_checks.limits import BodyLimits
from llumnix.server.body_checks.response_fields import check_response_fields
from llumnix.server.door.callers import who
from llumnix.server.errors import BadContent, Handler, error_response

# How many requests for engines an HTTP request will be; set in its handler's task.
asked: ContextVar[int] = ContextVar("asked", default=1)
# What its body says, in the same way; None if it is not JSON.
content: ContextVar[Any] = ContextVar("content", default=None)

_TOKENIZING = ("/tokenize", "/count_tokens")
# Fields by which a text is cut to what a model can take, and their values that cut nothing.
_CUT = (("truncate_prompt_tokens", None), ("truncation", "disabled"))
_GENERATING = ("/completions", "/responses", "/messages", "/generate", "/chat")
# Routes that tokenise themselves, and which of their fields.
_OWN_TEXTS = {
    "/generative_scoring": ("query", "items"),
    "/systemone": ("state", "questions", "instructions"),
}
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class Contents:
    """Refuses bodies that would cost too much, on all routes."""

    def __init__(
        self, within: BodyLimits, taken: Taken = NOTHING, room: MediaRoom | None = None
    ) -> None:
        """`taken`: what binary data the server takes; all other is refused.
        `room`: for images, sounds and videos of all requests, when they are decoded."""
        self._within = within
        self._taken = taken
        self._room = room

    @property
    def body_bytes(self) -> int:
        """The largest body, in bytes."""
        return self._within.body_bytes

    def guard(self, handler: Handler) -> Handler:
        """The handler, with 400 in its place for a body that holds too much."""

        async def look(request: web.Request) -> web.StreamResponse:
            if not request.body_exists:
                return await handler(request)
            body = await request.read()
            try:
                if request.content_type in _FORMS and body.lstrip()[:1] not in (b"{", b"["):
                    said = None
                    form = body.lstrip(b"\r\n")
                    check_form(form)
                    requests = weigh(form_fields(form))
                else:
                    said = self._read(body)
                    self._fits(request.path, body, said)
                    check_response_fields(request.path, said)
                    requests = weigh(said)
                await check_binary_fields(said, self._taken)
                asked.set(requests)
            except TooMuch as error:
                REFUSALS.labels("content").inc()
                return error_response(400, str(error))
            except BadContent as error:
                REFUSALS.labels("content").inc()
                return error_response(400, str(error), param=error.field)
            content.set(said)
            asker.set(who(request))
            media = MediaBudget(room=self._room) if self._taken.media_items else None
            media_budget.set(media)
            try:
                return await handler(request)
            finally:  # the next request of this connection has the same task
                asked.set(1)
                content.set(None)
                if media is not None:
                    media.room.leave(media)

        return look

    def _fits(self, path: str, body: bytes, said: Any) -> None:
        """Refuse long texts that vLLM would tokenise whole, however little a model can take.

        A prompt beyond the context is refused by its length, but not one that is to be truncated.
        """
        most = self._within.tokenize_bytes
        if isinstance(said, dict) and said.get("return_token_strs") and path.endswith(_TOKENIZING):
            most //= limits.TOKEN_STRINGS
        if len(body) <= most:
            return
        if path.endswith(_TOKENIZING):
            raise TooMuch(f"a text to tokenize must have at most {most} bytes with this model")
        cut = isinstance(said, dict) and any(said.get(n) not in (None, off) for n, off in _CUT)
        if cut and path.removesuffix("/render").endswith(_GENERATING):
            raise TooMuch(f"a body with a text to truncate must have at most {most} bytes")
        for route, names in _OWN_TEXTS.items():
            if path.endswith(route) and _text_bytes([said.get(n) for n in names]) > most:
                raise TooMuch(f"{' and '.join(names)} must have at most {most} bytes of text")

    def _read(self, body: bytes) -> Any:
        scan(body, self._within.values)
        said = read(body)
        if body.count(b":") > limits.KEYS:
            check_keys(said)
        check_strings(said, self._within.values)
        return said


def read(body: bytes) -> Any:
    """A body's content; None if it is no JSON, which the application words better.

    Raises TooMuch for strings that are no text.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass  # it may still be what Python's parser takes: NaN, half a surrogate, large numbers
    try:
        body.decode()  # json.loads itself takes half a surrogate, even as bytes
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    refuse_halves(body)
    return said


def _text_bytes(value: Any) -> int:
    """The size of all strings in a value."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return sum(map(_text_bytes, value))
    return len(value.encode(errors="surrogatepass")) if isinstance(value, str) else 0


def check_keys(said: Any, within: str = "the request", top: bool = True) -> None:
    """Raise BadContent for an object of many keys: a model may tell of each how wrong it is."""
    if type(said) is dict:
        if len(said) > limits.KEYS:
            most = limits.KEYS
            raise BadContent(f"an object in {within} must have at most {most} keys", within)
        for name, inner in said.items():
            if not limits.is_free(name, top) and (type(inner) is dict or type(inner) is list):
                check_keys(inner, name if top else within, False)
    elif type(said) is list:
        for inner in said:
            if type(inner) is dict or type(inner) is list:
                check_keys(inner, within, False)
