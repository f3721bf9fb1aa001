"""What a body has beside its prompts is paid for each request that an engine gets of it.

Parameters of sampling are validated, copied and sent once for each prompt and choice, and a
rendering route answers with them as often. A body that is small by itself can so cost as much as
thousands.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llumnix.server.body_checks import limits
from llumnix.server.body_checks.json_scan import outside_strings
from llumnix.server.body_checks.json_strings import written
from llumnix.server.errors import BadContent

# What is divided among the requests, or read once for all of them.
_PROMPTS = frozenset(
    (
        *("prompt", "input", "items", "text_1", "text_2", "data_1", "data_2", "prompt_embeds"),
        *("query", "queries", "texts", "inputs", "images", "token_ids", "features"),
        *("messages", "system", "state", "questions", "instructions", "content_parts"),
    )
)
_TALK = frozenset(("tools", "functions", "documents"))  # what a chat's template shows once
_SHORT = 256  # characters of a string that is no more than a name
_AUTOMATIC = (None, "auto", "none")  # choices of a tool of which no grammar is made


def check_copies(said: Mapping[str, Any], parts: Iterator[Mapping[str, Any]], copies: int) -> None:
    """Raise BadContent where so many copies of the parameters in these parts would be too much."""
    if copies == 1:
        return
    values = size = 0.0
    for part in parts:
        for name, value in part.items():
            if value.__class__ in _COUNTED and not _is_once(name, said) and value:
                if isinstance(value, str) and len(value) <= _SHORT:
                    continue
                text = written(value)
                size += len(text)
                values += limits.VALUE_COSTS.get(name, 1) * _values(text)
                _check(name, values, size, copies)


_COUNTED = frozenset((str, list, dict))


def _check(name: str, values: float, size: float, copies: int) -> None:
    if values * copies > limits.COPIED_VALUES or size * copies > limits.COPIED_BYTES:
        raise BadContent(
            f"{name} is too much for {copies} requests in one (prompts, times choices), each of "
            "which has its parameters; send fewer at once",
            name,
        )


def _is_once(name: str, said: Mapping[str, Any]) -> bool:
    """Whether a field is paid once, however many requests there are."""
    if name in _PROMPTS or name in ("sampling_params", "parameters"):
        return True
    if name not in _TALK:
        return False
    talk = said.get("messages")
    several = isinstance(talk, list) and bool(talk) and isinstance(talk[0], list)
    choice = said.get("tool_choice")
    return not several and (name == "documents" or choice in _AUTOMATIC)


def _values(text: bytes) -> int:
    """How many values JSON has, at least roughly: what stands between commas."""
    return outside_strings(text).count(b",") + 1
