"""What a renderer made of an image or a sound, which comes as MessagePack in base64.

vLLM makes tensors of it, and answers 500 for what is shaped otherwise.
"""

import dataclasses
import math
from typing import Any

from llumnix.engine.vllm import compat
from llumnix.server.body_checks.base64_text import Base64Text
from llumnix.server.body_checks.msgpack_scan import Bytes, MsgpackScan
from llumnix.server.body_checks.torch_file import dtype_named


class NoItem(ValueError):
    """A text of which no item is made; the message says why."""


def check_item(text: str, scan: MsgpackScan) -> None:
    """Raise NoItem for what vLLM could make no item of, TooMuch for what it should not try."""
    try:
        said = scan.read(Base64Text(text).whole())
    except ValueError as error:
        raise NoItem(f"it is no MessagePack in base64: {error}") from error
    if not isinstance(said, dict):
        raise NoItem("it is no map")
    for key, element in said.items():
        if not isinstance(element, dict) or element.keys() != compat.media_element_keys():
            raise NoItem(f"{key[:40]!r} is no element")
        if not _is_data(element["data"], top=True):
            raise NoItem(
                f"the data of {key[:40]!r} is neither a tensor, a number, nor lists of these"
            )
        if not _is_field(element["field"]):
            raise NoItem(f"the field of {key[:40]!r} is none of vLLM's")
        if not all(isinstance(element[name], str) for name in element.keys() - {"data", "field"}):
            raise NoItem(f"{key[:40]!r} is no element")


def _is_data(data: Any, top: bool = False) -> bool:
    if isinstance(data, list):
        if data and isinstance(data[0], str):
            return _is_tensor(data)
        return all(_is_data(inner) for inner in data)
    return isinstance(data, int | float) or (top and data is None)


def _is_tensor(said: list[Any]) -> bool:
    if len(said) != 3 or not isinstance(said[1], list) or not isinstance(said[2], Bytes):
        return False
    kind, shape, data = said
    dtype = dtype_named(kind)
    if dtype is None or any(type(n) is not int or n < 0 for n in shape):
        return False
    return bool(math.prod(shape) * dtype.itemsize == data.size)


def _is_field(said: Any) -> bool:
    if not isinstance(said, list) or len(said) != 2 or not isinstance(said[0], str):
        return False
    name, options = said
    field = compat.media_fields().get(name)
    if field is None or not isinstance(options, dict):
        return False
    known = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(field)}
    if options.keys() - known or any(needed and n not in options for n, needed in known.items()):
        return False
    return all(_is_option(option, value) for option, value in options.items())


def _is_option(name: str, value: Any) -> bool:
    if name == "slices":
        return isinstance(value, list) and _are_slices(value)
    return type(value) is (bool if name == "keep_on_cpu" else int)


def _are_slices(said: list[Any]) -> bool:
    if said and not isinstance(said[0], list):
        return len(said) <= 3 and all(n is None or type(n) is int for n in said)
    return all(isinstance(inner, list) and _are_slices(inner) for inner in said)
