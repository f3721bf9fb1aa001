"""Frozen dataclasses from mappings, as YAML has them, with errors that name the key.

A dataclass is its own schema: its fields are the keys, their types are checked, and fields without
a default must be there. Understood are int, float, str, bool, None, Literal, enumerations (by
value), tuples, lists, frozensets, mappings, dataclasses, and unions of all these.
"""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from math import isnan, nan
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints


class SimConfigError(ValueError):
    """A run cannot be made from what was given; the message names the key or the file."""


T = TypeVar("T")

# PyYAML, which follows YAML 1.1, takes 1e-3 for a text: it wants 1.0e-3.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def build(kind: type[T], value: object, where: str) -> T:
    """A dataclass from a mapping; `where` is the mapping's key, for errors; "" at the top.

    Raises:
        SimConfigError: a key is missing, unknown, or has a value of another type; or the dataclass
            refuses what it is given with a ValueError.
    """
    told = where or "the configuration"
    if not isinstance(value, Mapping):
        raise SimConfigError(f"{told} is {_shown(value)}, and must have the keys {_keys(kind)}")
    known = _fields(kind)
    for key in value:
        if key not in known:
            raise SimConfigError(f"{told} has no key {key!r}; it has {_keys(kind)}")
    for name, one in known.items():
        if name not in value and one.default is MISSING and one.default_factory is MISSING:
            raise SimConfigError(f"{_inside(where, name)} is missing")
    hints = get_type_hints(kind)
    built = {key: _convert(hints[key], one, _inside(where, key)) for key, one in value.items()}
    try:
        return kind(**built)
    except ValueError as error:
        raise SimConfigError(f"{told}: {error}") from error


def _convert(kind: Any, value: object, where: str) -> Any:
    """The value as the type wants it. Raises SimConfigError."""
    origin = get_origin(kind)
    if kind in (Any, object):
        return value
    if origin in (Union, UnionType):
        return _union(get_args(kind), value, where)
    if origin is Literal:
        return _choice(get_args(kind), value, where)
    if origin is not None:
        return _container(origin, get_args(kind), value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        return build(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(_choice([member.value for member in kind], value, where))
    if not _is_scalar(kind, value):
        raise SimConfigError(f"{where} is {_shown(value)}, and must be {_NAMES.get(kind, kind)}")
    return _float(value, where) if kind is float else value


def _float(value: object, where: str) -> float:
    try:
        number = float(cast(Any, value))
    except OverflowError:
        number = nan
    if isnan(number):
        raise SimConfigError(f"{where} is {_shown(value)}, and must be a number")
    return number


def _is_scalar(kind: Any, value: object) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False  # which Python takes for an int
    if kind is float:
        return isinstance(value, int | float) or _is_exponent(value)
    return isinstance(value, kind)


def _is_exponent(value: object) -> bool:
    return isinstance(value, str) and _EXPONENT.fullmatch(value) is not None


def _union(kinds: Sequence[Any], value: object, where: str) -> Any:
    """The first of the types that takes the value."""
    if value is None and NoneType in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not NoneType and _may_be(kind, value)] or [
        kind for kind in kinds if kind is not NoneType
    ]
    reasons = []
    for kind in kinds:
        try:
            return _convert(kind, value, where)
        except SimConfigError as error:
            reasons.append(error)
    if len(reasons) == 1:
        raise reasons[0]
    possible = ", or ".join(_named(kind) for kind in kinds)
    raise SimConfigError(f"{where} is {_shown(value)}, and must be {possible}")


def _may_be(kind: Any, value: object) -> bool:
    """Whether it is worth telling why the value is not of this type, and not of another."""
    if is_dataclass(kind):
        return isinstance(value, Mapping) and set(value) <= set(_fields(kind))
    origin = get_origin(kind)
    if origin is Literal:
        return type(value) in {type(choice) for choice in get_args(kind)}
    if origin is not None:
        return isinstance(value, _read_as(origin))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, str)
    return bool(_is_scalar(kind, value))


def _named(kind: Any) -> str:
    return f"have the keys {_keys(kind)}" if is_dataclass(kind) else _NAMES.get(kind, str(kind))


def _choice(choices: Sequence[Any], value: object, where: str) -> Any:
    for choice in choices:
        if choice == value and type(choice) is type(value):
            return choice
    raise SimConfigError(f"{where} is {_shown(value)}, and must be of {list(choices)}")


def _container(origin: Any, kinds: tuple[Any, ...], value: object, where: str) -> Any:
    if not isinstance(value, _read_as(origin)):
        needed = "a mapping" if _read_as(origin) is Mapping else "a list"
        raise SimConfigError(f"{where} is {_shown(value)}, and must be {needed}")
    if isinstance(value, Mapping):
        key_kind, kind = kinds
        return {
            _convert(key_kind, key, f"a key of {where}"): _convert(kind, one, _inside(where, key))
            for key, one in value.items()
        }
    items = cast(Sequence[object], value)
    if origin is tuple and Ellipsis not in kinds:
        if len(items) != len(kinds):
            raise SimConfigError(f"{where} is {_shown(value)}, and must have {len(kinds)} entries")
        each = kinds
    else:
        each = (kinds[0],) * len(items)
    made = [
        _convert(kind, item, f"{where}[{place}]")
        for place, (kind, item) in enumerate(zip(each, items, strict=True))
    ]
    if issubclass(origin, Set):
        return frozenset(made)
    return made if origin is list else tuple(made)


def _read_as(origin: Any) -> type:
    """What YAML has for a container."""
    return Mapping if issubclass(origin, Mapping) else list


def _fields(kind: Any) -> dict[str, Field[Any]]:
    return {one.name: one for one in fields(kind) if one.init}


def _keys(kind: Any) -> str:
    return ", ".join(_fields(kind))


def _inside(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _shown(value: object) -> str:
    """A value in an error: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
