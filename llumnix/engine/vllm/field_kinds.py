"""What JSON a field's type takes."""

import collections.abc
import dataclasses
import typing
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

_PLAIN = (str, int, float, bool, bytes, type(None))
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_OBJECTS = (dict, collections.abc.Mapping)
_ANY = frozenset({"list", "object"})


def kinds_of(annotation: Any) -> frozenset[str]:
    """Which of "list" and "object" a type takes; both if that can't be told."""
    annotation = _bare(annotation)
    if _is_union(annotation):
        return frozenset(kind for part in get_args(annotation) for kind in kinds_of(part))
    origin = get_origin(annotation) or annotation
    if origin is typing.Literal or origin in _PLAIN:
        return frozenset()
    if origin in _LISTS:
        return frozenset({"list"})
    if origin in _OBJECTS or typing.is_typeddict(origin):
        return frozenset({"object"})
    if isinstance(origin, type) and (
        issubclass(origin, BaseModel) or dataclasses.is_dataclass(origin)
    ):
        return frozenset({"object"})
    return _ANY


def items_of(annotation: Any) -> Any:
    """The type of a list's items, where it has one kind of list, of more than plain values."""
    lists = _lists(annotation)
    return lists[0] if len(lists) == 1 and kinds_of(lists[0]) else None


def _lists(annotation: Any) -> list[Any]:
    annotation = _bare(annotation)
    if _is_union(annotation):
        return [kind for part in get_args(annotation) for kind in _lists(part)]
    return [get_args(annotation)[0]] if get_origin(annotation) is list else []


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) is typing.Union or isinstance(annotation, UnionType)
