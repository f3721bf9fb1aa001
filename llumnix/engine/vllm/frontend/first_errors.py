"""Validators that stop at the first wrong item of each list, wherever it is within a type.

A validator of pydantic's tells of each wrong item, for each kind of item that it could be, all the
ways in which it is wrong, and does so for lists within lists: 200 kB of them took 22 s and 880,000
errors. These here accept and refuse the same, and tell of a few.
"""

import types
from types import FunctionType, MethodType
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
)
from pydantic_core import PydanticKnownError, SchemaValidator, core_schema

_LISTS = ("list", "tuple", "set", "frozenset")
_FUNCTIONS = ("function-before", "function-after", "function-wrap", "function-plain")
_APART = ("metadata", "serialization", "cls")  # parts of a schema that say nothing of what it takes

_MODELS: dict[type[BaseModel], type[BaseModel]] = {}


def of_type(annotation: Any) -> SchemaValidator | None:
    """The validator of a type; None if there can't be one outside of its model."""
    try:
        adapter = _adapter(annotation)
    except (PydanticSchemaGenerationError, RecursionError):  # a type that is made of itself
        return None
    return _validator(adapter.core_schema)


def lists_stopping(schema: Any) -> Any:
    """A schema of pydantic's core in which lists stop at the first error; it makes the same."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(lists_stopping, schema))
    if not isinstance(schema, dict):
        return schema
    new = {k: part if k in _APART else lists_stopping(part) for k, part in schema.items()}
    return new | {"fail_fast": True} if schema.get("type") in _LISTS else new


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # for a model or the like, which has a configuration of its own
        return TypeAdapter(annotation)


def of_model(model: type[BaseModel]) -> SchemaValidator:
    """The validator of a model, with all that the model mends before it looks."""
    if not isinstance(model.__pydantic_core_schema__, dict):  # it is made at its first use
        model.model_rebuild(force=True)
    return _validator(model.__pydantic_core_schema__)


def _validator(schema: Any) -> SchemaValidator:
    return SchemaValidator(_stopping(schema), _use_prebuilt=False)


def _stopping(schema: Any) -> Any:
    """A schema of pydantic's core in which lists and dictionaries stop at the first error."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_stopping, schema))
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if not isinstance(kind, str):  # it is no schema, but has some by their names
        return {name: _stopping(part) for name, part in schema.items()}
    new = {name: part if name in _APART else _stopping(part) for name, part in schema.items()}
    if kind in _LISTS:
        new["fail_fast"] = True
    elif kind == "dict" and not _takes_any(schema.get("values_schema")):
        return _stopping_dict(new)
    elif kind in _FUNCTIONS:
        new["function"] = schema["function"] | {"function": _over(schema["function"]["function"])}
    return new


def _takes_any(schema: Any) -> bool:
    return schema is None or schema.get("type") == "any"


def _stopping_dict(schema: dict[str, Any]) -> Any:
    """A dictionary as a list of pairs, as dictionaries themselves go on to their ends."""
    keys = schema.get("keys_schema", core_schema.any_schema())
    pair = core_schema.tuple_schema([keys, schema["values_schema"]], fail_fast=True)
    pairs = core_schema.list_schema(pair, fail_fast=True)
    made = core_schema.no_info_before_validator_function(_pairs, pairs)
    ref = {"ref": schema["ref"]} if "ref" in schema else {}
    return core_schema.no_info_after_validator_function(dict, made, **ref)


def _pairs(value: Any) -> Any:
    if not isinstance(value, dict):
        raise PydanticKnownError("dict_type")
    return list(value.items())


def _over(function: Any) -> Any:
    """A validator's function that makes models, over models that stop at their first error."""
    inner = getattr(function, "__func__", function)
    if not isinstance(inner, FunctionType):
        return function
    models = {
        name: _stopping_model(kind)
        for name in inner.__code__.co_names
        if isinstance(kind := inner.__globals__.get(name), type) and issubclass(kind, BaseModel)
    }
    if not models:
        return function
    rest = (inner.__name__, inner.__defaults__, inner.__closure__)
    made = FunctionType(inner.__code__, inner.__globals__ | models, *rest)
    made.__kwdefaults__ = inner.__kwdefaults__
    return made if inner is function else MethodType(made, function.__self__)


def _stopping_model(model: type[BaseModel]) -> type[BaseModel]:
    """A model that stops at its first error, made once: a function may make its own model again."""
    if model not in _MODELS:
        made: Any = types.new_class(model.__name__, (model,))
        _MODELS[model] = made
        made.__pydantic_validator__ = of_model(made)
    return _MODELS[model]
