"""What JSON a field's type takes, and types that stop at the first wrong item of a list."""

import collections.abc
import dataclasses
import typing
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, FailFast, PydanticUserError, TypeAdapter

Adapter = TypeAdapter[Any]

_PLAIN = (str, int, float, bool, bytes, type(None))
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_OBJECTS = (dict, collections.abc.Mapping)


class _FirstError(FailFast):
    """Pydantic's mark of a list that stops at its first wrong item, as unions can have it."""

    __hash__ = object.__hash__


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


def items_of(annotation: Any) -> Adapter | None:
    """The type of a list's items, where it has one kind of list, of more than plain values."""
    lists = _lists(annotation)
    if len(lists) != 1 or lists[0] in _PLAIN or not kinds_of(lists[0]):
        return None
    return _adapter(_stopping(lists[0]))


def first_error_only(annotation: Any) -> Adapter | None:
    """The same type, of which each list tells of its first wrong item alone; None without lists."""
    return _adapter(_stopping(annotation)) if _has_list(annotation) else None


def _adapter(annotation: Any) -> Adapter:
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # for a model or the like, which has a configuration of its own
        return TypeAdapter(annotation)


def _has_list(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return origin is list or any(map(_has_list, get_args(annotation)))


def _lists(annotation: Any) -> list[Any]:
    annotation = _bare(annotation)
    if _is_union(annotation):
        return [kind for part in get_args(annotation) for kind in _lists(part)]
    return [get_args(annotation)[0]] if get_origin(annotation) is list else []


def _stopping(annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin is list:
        return Annotated[list[_stopping(get_args(annotation)[0])], _FirstError()]  # type: ignore[misc]
    if origin is dict:
        key, value = get_args(annotation)
        return dict[key, _stopping(value)]  # type: ignore[valid-type, misc]
    if _is_union(annotation):
        return typing.Union[tuple(map(_stopping, get_args(annotation)))]  # noqa: UP007
    if origin is Annotated:
        first, *rest = get_args(annotation)
        return Annotated[(_stopping(first), *rest)]
    return annotation


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) is typing.Union or isinstance(annotation, UnionType)
