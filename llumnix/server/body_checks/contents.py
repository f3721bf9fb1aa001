"""What a body asks for, looked at before vLLM parses it: how many requests, how much of what."""

import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import orjson
from aiohttp import web

from llumnix.engine.vllm.grammars import SPEC_BYTES, asker
from llumnix.engine.vllm.media_budgets import MediaBudget, MediaRoom, media_budget
from llumnix.metrics import REFUSALS
from llumnix.server.body_checks import limits
from llumnix.server.body_checks.binary_fields import NOTHING, Taken, check_binary_fields
from llumnix.server.body_checks.json_scan import TooMuch, refuse_halves, scan, scan_texts
from llumnix.server.body_checks.json_strings import check_strings
from llumnix.server.body_checks.limits import BodyLimits
from llumnix.server.body_checks.response_fields import check_metadata
from llumnix.server.door.callers import who
from llumnix.server.errors import BadContent, Handler, error_response
from llumnix.server.transport.head_checks import REQUEST_ID_SIZE, is_request_id

# How many requests for engines an HTTP request will be; set in its handler's task.
asked: ContextVar[int] = ContextVar("asked", default=1)
# What its body says, in the same way; None if it is not JSON.
content: ContextVar[Any] = ContextVar("content", default=None)

# Objects of a body in which some routes have the parameters of sampling.
_INNER = ("sampling_params", "parameters")
# Fields that hold one prompt, or a list of them: for each an engine gets a request.
_PROMPTS = ("prompt", "input", "items", "text_1", "text_2", "data_1", "data_2")
_TALK = ("messages", "input")  # lists whose items are wrong in many ways, if they are
_TOKENIZING = ("/tokenize", "/count_tokens")
# Fields by which a text is cut to what a model can take, and their values that cut nothing.
_CUT = (("truncate_prompt_tokens", None), ("truncation", "disabled"))
# Objects that grammars are made of, which a parser of tools may compile before they are tried.
_GRAMMARS = ("structured_outputs", "response_format", "text")
_GENERATING = ("/completions", "/responses", "/messages", "/generate")
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
                said = self._read(request.content_type, body)
                self._fits(request.path, body, said)
                check_metadata(request.path, said)
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
        if cut and path.endswith(_GENERATING):
            raise TooMuch(f"a body with a text to truncate must have at most {most} bytes")

    def _read(self, content_type: str, body: bytes) -> Any:
        if content_type in _FORMS:
            return check_form(body)
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


def check_keys(said: Any, within: str = "the request", top: bool = True) -> None:
    """Raise BadContent for an object of many keys: a model may tell of each how wrong it is."""
    if type(said) is dict:
        if len(said) > limits.KEYS:
            most = limits.KEYS
            raise BadContent(f"an object in {within} must have at most {most} keys", within)
        for name, inner in said.items():
            if not _is_free(name, top) and (type(inner) is dict or type(inner) is list):
                check_keys(inner, name if top else within, False)
    elif type(said) is list:
        for inner in said:
            if type(inner) is dict or type(inner) is list:
                check_keys(inner, within, False)


def _is_free(name: str, top: bool = False) -> bool:
    """Whether a field is for what clients like, such as what a tool is called with."""
    return name in limits.FREE or (name == "input" and not top)


def weigh(said: Any) -> int:
    """How many requests for engines a body is: prompts, times choices or beams; 1 at least.

    Raises BadContent for what is too much.
    """
    if not isinstance(said, dict):
        return 1
    for part in _parts(said):
        _check(part)
    for name in _TALK:
        items = said.get(name)
        for item in items if isinstance(items, list) else ():
            _check_inside(name, item)
    prompts = max(_prompts(name, said.get(name)) for name in _PROMPTS)
    if embeds := said.get("prompt_embeds"):  # prompts beside those of text
        prompts = _prompts("prompt_embeds", embeds) + (prompts if said.get("prompt") else 0)
    choices = max(_whole(part.get(name)) for part in _parts(said) for name in limits.LARGEST)
    batched = said.get("messages")
    if isinstance(batched, list) and batched and isinstance(batched[0], list):
        prompts = _at_most("messages", len(batched), limits.PROMPTS)  # conversations
    return prompts * choices


def _parts(said: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield said
    for name in _INNER:
        if isinstance(inner := said.get(name), dict):
            yield inner


def _check(part: Mapping[str, Any]) -> None:
    for name, largest in limits.LARGEST.items():
        if _whole(part.get(name)) > largest:
            raise BadContent(f"{name} must be at most {largest}", name)
    if part.get("use_beam_search") and _whole(part.get("n")) > limits.BEAMS:
        raise BadContent(f"n must be at most {limits.BEAMS} with use_beam_search", "n")
    if part.get("use_beam_search") and not _is_small(part.get("length_penalty", 1)):
        most = limits.LENGTH_PENALTY
        message = f"length_penalty must be between -{most:g} and {most:g} with use_beam_search"
        raise BadContent(message, "length_penalty")
    if part.get("trace_decode_token_ids") == []:  # else an assertion of vLLM's: 500
        raise BadContent("trace_decode_token_ids must not be empty", "trace_decode_token_ids")
    grammar = part.get("structured_outputs")
    if grammar is not None and not isinstance(grammar, dict):
        raise BadContent("structured_outputs must be an object", "structured_outputs")
    stop = part.get("stop")
    if not (stop is None or isinstance(stop, str) or _are_strings(stop)):
        raise BadContent("stop must be a string or a list of strings", "stop")
    for name, items in limits.ITEMS.items():
        value = part.get(name)
        if isinstance(value, list | dict):
            _at_most(name, len(value), items)
    for name, size in limits.STRING_BYTES.items():
        value = part.get(name)
        strings = value if isinstance(value, list) else [value]
        if sum(len(s) for s in strings if isinstance(s, str)) > size:
            raise BadContent(f"{name} must have at most {size} characters", name)
    name = "request_id"
    if isinstance(value := part.get(name), str) and not is_request_id(value):
        most = REQUEST_ID_SIZE
        raise BadContent(f"{name} must have at most {most} printable ASCII characters", name)
    for name in _GRAMMARS:
        if isinstance(value := part.get(name), dict) and written(value) > SPEC_BYTES:
            raise BadContent(f"{name} must have at most {SPEC_BYTES} bytes", name)


def _is_small(penalty: Any) -> bool:
    try:
        return penalty is None or abs(float(penalty)) <= limits.LENGTH_PENALTY
    except (TypeError, ValueError):
        return True  # no number, which a model words better
    except OverflowError:
        return False


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def written(value: Any) -> int:
    """The size of a value in JSON."""
    try:
        return len(orjson.dumps(value))
    except TypeError:  # half a surrogate, or a large number
        return len(json.dumps(value))


def _check_inside(name: str, value: Any) -> None:
    """Refuse long lists in an item, but for what is only data; one of token ids is a prompt."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not _is_free(key):
                _check_inside(name, inner)
    elif isinstance(value, list) and not set(map(type, value)) <= {int}:
        if len(value) > limits.INNER_ITEMS:
            most = limits.INNER_ITEMS
            raise BadContent(f"a list within {name} must have at most {most} items", name)
        for inner in value:
            _check_inside(name, inner)


def _prompts(name: str, value: Any) -> int:
    """Of how many prompts a field is; a list of numbers is one."""
    if not isinstance(value, list) or not value or isinstance(value[0], int | float):
        return 1
    if name == "input" and isinstance(value[0], dict):
        return _at_most(name, len(value), limits.ITEMS["messages"]) and 1  # items of one answer
    return _at_most(name, len(value), limits.PROMPTS)


def _at_most(name: str, number: int, most: int) -> int:
    if number > most:
        raise BadContent(f"{name} must have at most {most} items, not {number}", name)
    return number


def _whole(value: Any) -> int:
    """A number of choices, as vLLM would read it; 1 for what is none."""
    if isinstance(value, str) and len(value) < 20:
        try:
            value = float(value)
        except ValueError:
            return 1
    if not isinstance(value, int | float) or value != value:
        return 1
    return int(min(max(value, 1), 2**31))


def check_form(body: bytes) -> None:
    """Raise TooMuch for a form of many parts, which is read sign by sign."""
    if body[:2] != b"--":
        if len(body) > limits.FORM_HEAD_BYTES or body.count(b"&") >= limits.FORM_PARTS:
            raise TooMuch(
                f"a form must have at most {limits.FORM_PARTS} fields in "
                f"{limits.FORM_HEAD_BYTES} bytes; send files as multipart/form-data"
            )
        return
    boundary = body[: body.find(b"\r\n")] if b"\r\n" in body[:256] else body[:256]
    parts = body.split(boundary, limits.FORM_PARTS + 2)
    if len(parts) > limits.FORM_PARTS + 2:
        raise TooMuch(f"a form must have at most {limits.FORM_PARTS} parts")
    halves = [part.partition(b"\r\n\r\n") for part in parts]
    if sum(len(head) for head, _, _ in halves) > limits.FORM_HEAD_BYTES:
        raise TooMuch(
            f"the parts of a form must have at most {limits.FORM_HEAD_BYTES} bytes of headers"
        )
    # vllm_xargs is JSON; no sound and no image begins so.
    scan_texts([text for _, _, text in halves if text.lstrip(b" \t\r\n")[:1] in (b"{", b"[")])
