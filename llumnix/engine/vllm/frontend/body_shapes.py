"""The shape of what is large in a body, looked at before a route's model sees it.

A model of vLLM's tells of each wrong item, for each kind of item that it could be, all the ways in
which it is wrong: for some thousand wrong ones that takes seconds of the loop, and gigabytes. Here
the first one is enough. An object where a list is due is not even tried, as some models make a list
of its keys.
"""

import asyncio
import collections.abc
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import SchemaValidator

from llumnix.engine.vllm.frontend import first_errors

FEW = 128  # keys and items, at all levels of a field, that are left to the model
AT_ONCE = 32  # items between which others have their turn
# A route that reads its body itself, and tries what these take one after another.
_ANY_OF = {
    "/invocations": (
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/classify"),
        *("/rerank", "/score", "/pooling"),
    )
}


@dataclass(frozen=True, slots=True)
class _Field:
    """What a field of a model may be, as far as it is of lists or objects."""

    name: str
    takes_list: bool
    takes_object: bool
    items: SchemaValidator | None  # of slices of its list, if it has one kind, and no plain values
    whole: SchemaValidator | None  # the type itself, if it takes lists or objects


class _Shape:
    """A model of a route's bodies."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.fields: dict[str, _Field] = {}
        for name, field in model.model_fields.items():
            self.fields[field.alias or name] = self.fields[name] = _field(name, field.annotation)
        mends = any(
            decorator.info.mode == "before"
            for decorator in model.__pydantic_decorators__.model_validators.values()
        )
        self._mending = first_errors.of_model(model) if mends else None

    async def problem(self, said: str, value: list[Any] | dict[str, Any]) -> str | None:
        """What is wrong with the value of a field, in one sentence; None if nothing."""
        field = self.fields[said]
        if isinstance(value, list) and not field.takes_list:
            return f"{said} must not be a list"
        if isinstance(value, dict) and not field.takes_object:
            return f"{said} must not be an object"
        if not _is_large(value):
            return None
        if isinstance(value, list) and field.items is not None:
            return await self._first_wrong(said, field.items, value)
        wrong = None if field.whole is None else _error(field.whole, value)
        if wrong is None or self._mends(said, value):
            return None
        return f"{said} is not what this route takes: {wrong['msg']}"

    async def _first_wrong(
        self, said: str, items: SchemaValidator, values: list[Any]
    ) -> str | None:
        start = 0
        while start < len(values):
            part = values[start : start + AT_ONCE]
            if (wrong := _error(items, part)) is None:
                start += AT_ONCE
            else:
                index = wrong["loc"][0] if wrong["loc"] else 0
                start += index
                if not self._mends(said, [values[start]]):
                    return f"{said}[{start}] is not what this route takes: {wrong['msg']}"
                start += 1
            await asyncio.sleep(0)
        return None

    def _mends(self, said: str, value: Any) -> bool:
        """Whether the model takes what its field's type does not: some add what is left out."""
        if self._mending is None:
            return False
        try:
            self._mending.validate_python({"model": "m", said: value})
        except ValidationError as error:
            own = ((), (said,), (self.fields[said].name,))
            return not any(each["loc"][:1] in own for each in _errors(error))
        except Exception:  # of a validator that trusts what it sees
            return False
        return True


class Shapes:
    """Knows, of each route of vLLM's application, what the fields of its bodies are."""

    def __init__(self, app: Any, root_path: str) -> None:
        self._root = root_path.rstrip("/")
        self._routes: dict[str, tuple[_Shape, ...]] = {}
        shapes: dict[type[BaseModel], _Shape] = {}
        for path, models in _bodies(app):
            for model in models:
                if model not in shapes:
                    shapes[model] = _Shape(model)
            self._routes[path] = tuple(shapes[model] for model in models)
        for path, others in _ANY_OF.items():
            self._routes[path] = tuple(
                shape for other in others for shape in self._routes.get(other, ())
            )

    async def problem(self, path: str, content: Any) -> str | None:
        """What is wrong with a large field of a body, in one sentence; None if nothing.

        Of several models that a route takes, one that has the field must take it.
        """
        if not isinstance(content, Mapping):
            return None
        shapes = self._routes.get(path.removeprefix(self._root), ())
        for name, value in content.items():
            if not isinstance(value, list | dict):
                continue
            wrong = None
            for shape in shapes:
                if name in shape.fields:
                    wrong = await shape.problem(name, value)
                    if wrong is None:
                        break
            if wrong is not None:
                return wrong
        return None


def _errors(error: ValidationError) -> list[Any]:
    return error.errors(include_url=False, include_input=False, include_context=False)


def _error(validator: SchemaValidator, value: Any) -> Any:
    """The first error of a value; None if there is none."""
    try:
        validator.validate_python(value)
    except ValidationError as error:
        return _errors(error)[0]
    return None


def _is_large(value: list[Any] | dict[str, Any]) -> bool:
    """Whether it has more than a few keys and items, at all levels together."""
    size = 0
    left: list[Any] = [value]
    while left and size <= FEW:
        part = left.pop()
        size += len(part)
        if size <= FEW:
            inner = part.values() if isinstance(part, dict) else part
            left.extend(each for each in inner if isinstance(each, list | dict))
    return size > FEW


def _bodies(app: Any) -> Iterator[tuple[str, list[type[BaseModel]]]]:
    for route in app.routes:
        for body in getattr(getattr(route, "dependant", None), "body_params", ()):
            if models := _models(body.field_info.annotation):
                yield route.path, models


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models of a route's body: one, or some of which it takes the first that fits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _field(name: str, annotation: Any) -> _Field:
    kinds = kinds_of(annotation)
    item = items_of(annotation)
    return _Field(
        name=name,
        takes_list="list" in kinds,
        takes_object="object" in kinds,
        items=None if item is None else first_errors.of_type(list.__class_getitem__(item)),
        whole=first_errors.of_type(annotation) if kinds - ({"list"} if item else set()) else None,
    )


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
