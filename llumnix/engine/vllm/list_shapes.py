"""The shape of long lists in bodies, looked at item by item before a route's model sees them.

A model of vLLM's tells of each wrong item all the ways in which it is wrong. For a chat of some
thousand wrong messages that takes half a second of the loop; here the first one is enough.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

FEW = 32  # items that are left to the model
AT_ONCE = 256  # items between which others have their turn
FIELDS = ("messages", "input")


class Shapes:
    """Knows, of each route of vLLM's application, what the items of its long lists are."""

    def __init__(self, app: Any, root_path: str) -> None:
        self._root = root_path.rstrip("/")
        self._items: dict[str, dict[str, TypeAdapter[Any]]] = {}
        for route in app.routes:
            dependant = getattr(route, "dependant", None)
            for body in getattr(dependant, "body_params", ()):
                model = body.field_info.annotation
                if isinstance(model, type) and issubclass(model, BaseModel):
                    self._items[route.path] = _items_of(model)

    async def problem(self, path: str, content: Any) -> str | None:
        """What is wrong with an item of a body's long lists, in one sentence; None if nothing."""
        if not isinstance(content, Mapping):
            return None
        for name, item in self._items.get(path.removeprefix(self._root), {}).items():
            values = content.get(name)
            if not isinstance(values, list) or len(values) <= FEW:
                continue
            for index, value in enumerate(values):
                if index and index % AT_ONCE == 0:
                    await asyncio.sleep(0)
                try:
                    item.validate_python(value)
                except ValidationError as error:
                    why = error.errors(include_url=False, include_input=False)[0]["msg"]
                    return f"{name}[{index}] is not what this route takes: {why}"
            await asyncio.sleep(0)
        return None


def _items_of(model: type[BaseModel]) -> dict[str, TypeAdapter[Any]]:
    """The types of the items of a model's fields, where they are lists of one kind."""
    found = {}
    for name in FIELDS:
        field = model.model_fields.get(name)
        kinds = _lists(field.annotation) if field is not None else []
        if len(kinds) == 1:
            found[name] = TypeAdapter(kinds[0])
    return found


def _lists(annotation: Any) -> list[Any]:
    if get_origin(annotation) is list:
        return [get_args(annotation)[0]]
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [kind for part in get_args(annotation) for kind in _lists(part)]
    return []
