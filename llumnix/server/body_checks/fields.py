"""The fields of a body: how much each may be, and how many requests for engines they make."""

from collections.abc import Iterator, Mapping
from typing import Any

from llumnix.engine.vllm.grammars.checks import SPEC_BYTES
from llumnix.server.body_checks import limits
from llumnix.server.body_checks.copies import check_copies
from llumnix.server.body_checks.json_scan import outside_strings
from llumnix.server.body_checks.json_strings import written
from llumnix.server.body_checks.numbers import whole
from llumnix.server.errors import BadContent
from llumnix.server.transport.head_checks import REQUEST_ID_SIZE, is_request_id

# Objects of a body in which some routes have the parameters of sampling.
_INNER = ("sampling_params", "parameters")
# Fields that hold one prompt, or a list of them: for each an engine gets a request.
_PROMPTS = ("prompt", "input", "items", "text_1", "text_2", "data_1", "data_2", "questions")
# The same where there is no chat, which shows its documents to the model in one prompt.
_RANKED = ("documents", "queries", "texts", "inputs", "images")
_TALK = ("messages", "input")  # lists whose items are wrong in many ways, if they are
# Objects that grammars are made of, which a parser of tools may compile before they are tried.
_GRAMMARS = ("structured_outputs", "response_format", "text")


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
    names = _PROMPTS if "messages" in said or "state" in said else _PROMPTS + _RANKED
    prompts = max(_prompts(name, said.get(name)) for name in names)
    if embeds := said.get("prompt_embeds"):  # prompts beside those of text
        prompts = _prompts("prompt_embeds", embeds) + (prompts if said.get("prompt") else 0)
    choices = max(whole(part.get(name)) for part in _parts(said) for name in limits.LARGEST)
    batched = said.get("messages")
    if isinstance(batched, list) and batched and isinstance(batched[0], list):
        prompts = _at_most("messages", len(batched), limits.PROMPTS)  # conversations
    check_copies(said, _parts(said), prompts * choices)
    return prompts * choices


def _parts(said: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield said
    for name in _INNER:
        if isinstance(inner := said.get(name), dict):
            yield inner


def _check(part: Mapping[str, Any]) -> None:
    for name, largest in limits.LARGEST.items():
        if whole(part.get(name)) > largest:
            raise BadContent(f"{name} must be at most {largest}", name)
    if part.get("use_beam_search") and whole(part.get("n")) > limits.BEAMS:
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
    for name, (most, size) in limits.EXTRAS.items():
        if isinstance(value := part.get(name), dict | str):
            _check_extras(name, written(value), most, size)
    for name in _GRAMMARS:
        if isinstance(value := part.get(name), dict) and len(written(value)) > SPEC_BYTES:
            raise BadContent(f"{name} must have at most {SPEC_BYTES} bytes", name)


def _check_extras(name: str, text: bytes, most: int, size: int) -> None:
    if len(text) > size or outside_strings(text).count(b",") >= most:
        raise BadContent(f"{name} must have at most {most} values and {size} bytes", name)


def _is_small(penalty: Any) -> bool:
    try:
        return penalty is None or abs(float(penalty)) <= limits.LENGTH_PENALTY
    except (TypeError, ValueError):
        return True  # no number, which a model words better
    except OverflowError:
        return False


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_inside(name: str, value: Any) -> None:
    """Refuse long lists in an item, but for what is only data; one of token ids is a prompt."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not limits.is_free(key):
                _check_inside(name, inner)
    elif isinstance(value, list) and not set(map(type, value)) <= {int}:
        if len(value) > limits.INNER_ITEMS:
            most = limits.INNER_ITEMS
            raise BadContent(f"a list within {name} must have at most {most} items", name)
        for inner in value:
            _check_inside(name, inner)


def _prompts(name: str, value: Any) -> int:
    """Of how many prompts a field is; a list of numbers is one."""
    if isinstance(value, dict):  # named ones, or a ranking's texts and images
        value = list(value) if name == "questions" else value.get("content")
    if not isinstance(value, list) or not value or isinstance(value[0], int | float):
        return 1
    if name == "input" and isinstance(value[0], dict):
        return _at_most(name, len(value), limits.ITEMS["messages"]) and 1  # items of one answer
    return _at_most(name, len(value), limits.ITEMS.get(name, limits.PROMPTS))


def _at_most(name: str, number: int, most: int) -> int:
    if number > most:
        raise BadContent(f"{name} must have at most {most} items, not {number}", name)
    return number
