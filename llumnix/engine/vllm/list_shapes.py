"""The shape of what is large in a body, looked at before a route's model sees it.

A model of vLLM's tells of each wrong item, for each kind of item that it could be, all the ways in
which it is wrong: for some thousand wrong ones that takes seconds of the loop, and gigabytes. Here
the first one is enough. An object where a list is due is not even tried, as some models make a list
of its keys.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from llumnix.engine.vllm.field_kinds import Adapter, first_error_only, items_of, kinds_of

FEW = 32  # items that are left to the model, with those that they hold themselves
AT_ONCE = 256  # items between which others have their turn


@dataclass(frozen=True, slots=True)
class _Field:
    """What a field of a model may be, as far as it is of lists or objects."""

    takes_list: bool
    takes_object: bool
    items: Adapter | None  # of its list, if it has one kind of list, of more than plain values
    whole: Adapter | None  # the type itself, if it has other lists


class Shapes:
    """Knows, of each route of vLLM's application, what the fields of its bodies are."""

    def __init__(self, app: Any, root_path: str) -> None:
        self._root = root_path.rstrip("/")
        self._routes: dict[str, tuple[type[BaseModel], ...]] = {}
        self._fields: dict[type[BaseModel], dict[str, _Field]] = {}
        for route in app.routes:
            dependant = getattr(route, "dependant", None)
            for body in getattr(dependant, "body_params", ()):
                if models := tuple(_models(body.field_info.annotation)):
                    self._routes[route.path] = models
                for model in models:
                    self._fields.setdefault(model, _fields_of(model))

    async def problem(self, path: str, content: Any) -> str | None:
        """What is wrong with a large field of a body, in one sentence; None if nothing."""
        if not isinstance(content, Mapping):
            return None
        wrong = None
        for model in self._routes.get(path.removeprefix(self._root), ()):
            wrong = await self._problem(model, content)
            if wrong is None:
                return None  # one of the models that the route takes
        return wrong

    async def _problem(self, model: type[BaseModel], content: Mapping[str, Any]) -> str | None:
        fields = self._fields[model]
        for name, value in content.items():
            if not isinstance(value, list | dict) or (field := fields.get(name)) is None:
                continue
            if isinstance(value, list) and not field.takes_list:
                return f"{name} must not be a list"
            if isinstance(value, dict) and not field.takes_object:
                return f"{name} must not be an object"
            if not _is_large(value):
                continue
            if isinstance(value, list) and field.items is not None:
                wrong = await _first_wrong(model, name, field.items, value)
            elif field.whole is not None:
                wrong = _why(model, name, field.whole, value)
            else:
                continue
            if wrong is not None:
                return wrong
            await asyncio.sleep(0)
        return None


async def _first_wrong(
    model: type[BaseModel], name: str, items: Adapter, values: list[Any]
) -> str | None:
    for index, value in enumerate(values):
        if index and index % AT_ONCE == 0:
            await asyncio.sleep(0)
        try:
            items.validate_python(value)
        except ValidationError as error:
            if not _is_mended(model, name, [value]):
                return f"{name}[{index}] is not what this route takes: {_first(error)}"
    return None


def _why(model: type[BaseModel], name: str, whole: Adapter, value: Any) -> str | None:
    try:
        whole.validate_python(value)
    except ValidationError as error:
        if not _is_mended(model, name, value[:1] if isinstance(value, list) else value):
            return f"{name} is not what this route takes: {_first(error)}"
    return None


def _is_mended(model: type[BaseModel], name: str, value: Any) -> bool:
    """Whether the model takes what its field's type does not: some add what clients leave out."""
    field = model.model_fields[name]
    if _is_large(value) or not any(
        decorator.info.mode == "before"
        for decorator in model.__pydantic_decorators__.model_validators.values()
    ):
        return False
    try:
        model.model_validate({"model": "m", name: value})
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)
        return not any(each["loc"][:1] in ((), (name,), (field.alias,)) for each in wrong)
    except Exception:  # of a validator that trusts what it sees
        return False
    return True


def _first(error: ValidationError) -> str:
    return error.errors(include_url=False, include_input=False, include_context=False)[0]["msg"]


def _is_large(value: list[Any] | dict[str, Any]) -> bool:
    """Whether it, and what is in its items, has more than a few items together."""
    size = len(value)
    for item in value if isinstance(value, list) else value.values():
        if size > FEW:
            return True
        if isinstance(item, list | dict):
            size += sum(
                len(inner)
                for inner in (item.values() if isinstance(item, dict) else item)
                if isinstance(inner, list | dict)
            )
            size += len(item) if isinstance(item, list) else 0
    return size > FEW


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models of a route's body: one, or some of which it takes the first that fits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _fields_of(model: type[BaseModel]) -> dict[str, _Field]:
    found = {}
    for name, field in model.model_fields.items():
        kinds = kinds_of(field.annotation)
        items = items_of(field.annotation)
        found[name] = _Field(
            takes_list="list" in kinds,
            takes_object="object" in kinds,
            items=items,
            whole=first_error_only(field.annotation) if items is None else None,
        )
    return found
