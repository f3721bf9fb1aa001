"""Frozen dataclasses from mappings, as YAML has them, with errors that name the key.

A dataclass is its own schema: its fields are the keys, and pydantic checks their types. Of what it
finds wrong, one sentence is told.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from reprlib import repr as short
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails


class SimConfigError(ValueError):
    """A run cannot be made from what was given; the message names the key or the file."""


T = TypeVar("T")

_RULES = ConfigDict(strict=True, extra="forbid")


def build(kind: type[T], value: object, where: str) -> T:
    """A dataclass from a mapping; `where` is the mapping's key, for errors; "" at the top.

    Raises:
        SimConfigError: a key is missing, unknown, or has a value of another type; or the dataclass
            refuses what it is given with a ValueError.
        TypeError, ValueError, RecursionError: it cannot be written as JSON.
    """
    # From JSON, pydantic makes tuples, sets and enumerations also where it is strict, as it must be
    # lest it make a number from a text or a bool.
    given = json.dumps({where: value}, check_circular=False)
    try:
        adapter = TypeAdapter(dict[str, kind], config=_RULES)  # type: ignore[valid-type]
        return adapter.validate_json(given)[where]
    except ValidationError as error:
        raise SimConfigError(_sentence(kind, error.errors(), json.loads(given))) from error


def _sentence(kind: type, errors: Sequence[ErrorDetails], given: object) -> str:
    error = _foremost(errors)
    place, way, last = error["loc"], error["loc"][:-1], error["loc"][-1:]
    match error["type"]:
        case "json_invalid":
            return f"the configuration cannot be recorded as JSON: {error['ctx']['error']}"
        case "value_error":
            return f"{_path(place, given)}: {error['ctx']['error']}"
        case "missing":
            return f"{_path(way, given, *last)} is missing"
        case "unexpected_keyword_argument":
            return f"{_path(way, given)} has no key {last[0]!r}; it has {_keys(kind, way)}"
    told = _path(place, given)
    # A union has an error for each of its types.
    same = (e for e in errors if e["loc"][:-1] == way and _path(e["loc"], given) == told)
    needs = ", or ".join(dict.fromkeys(_need(kind, one) for one in same))
    if last == ("[key]",):
        told = f"a key of {_path(way[:-1], given)}"
    return f"{told} is {short(error['input'])}, and must {needs}"


def _foremost(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """The one to tell: of the types of a union, that of the type which the value is most like."""
    beside = Counter(error["loc"][:-1] for error in errors)
    return max(
        errors,
        key=lambda error: (
            error["type"] == "value_error",  # the keys are right, and so are their types
            len(error["loc"]),
            -beside[error["loc"][:-1]],
            error["type"] != "missing",
            error["type"] != "unexpected_keyword_argument",
        ),
    )


def _need(kind: type, error: ErrorDetails) -> str:
    if error["type"] == "dataclass_type":
        return f"have the keys {_keys(kind, error['loc'])}"
    return error["msg"].removeprefix("Input should ")


def _keys(kind: type, place: tuple[int | str, ...]) -> str:
    """Those of the dataclass at a place, where pydantic names it if others could be there."""
    here: list[Any] = [kind]
    for step in place:
        inside = [one for each in here for one in _dataclasses(get_type_hints(each).get(str(step)))]
        here = inside or [each for each in here if each.__name__ == step] or here
    return ", ".join(one.name for each in here for one in fields(each) if one.init)


def _dataclasses(kind: Any) -> Iterator[Any]:
    if is_dataclass(kind):
        yield kind
    for part in get_args(kind):
        yield from _dataclasses(part)


def _path(place: tuple[int | str, ...], given: Any, *more: int | str) -> str:
    """A place as a reader has it: without the types of unions, which pydantic puts among it."""
    steps: list[int | str] = []
    for step in place:
        with suppress(LookupError, TypeError):
            given = given[step]
            steps.append(step)
    path = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in (*steps, *more))
    return path.lstrip(".") or "the configuration"
