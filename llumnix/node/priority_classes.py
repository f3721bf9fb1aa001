"""The file of --priority-classes: a YAML mapping of class names to what their requests get."""

import re
from collections.abc import Mapping
from math import isnan
from types import MappingProxyType
from typing import Any

import yaml

from llumnix.config import ConfigError
from llumnix.policy.classes import NO_CLASSES, PRIORITIES, Classes, PriorityClass

OPTION = "--priority-classes"
# A request may name a class or a number, so a name must not look like one.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_WHOLE = ("priority", "headroom_tokens", "target_tokens")
_SECONDS = ("ttft", "tpot")


def read_classes(path: str) -> Classes:
    """The classes of a file; none if the path is empty.

    Raises:
        ConfigError: there is no such file, or something in it cannot work.
    """
    if not path:
        return NO_CLASSES
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"{OPTION}: {path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        sentence = " ".join(str(error).split())
        raise ConfigError(f"{OPTION}: {path} is no YAML: {sentence}") from error
    try:
        return _classes(content)
    except ValueError as error:
        raise ConfigError(f"{OPTION}: {path}: {error}") from error


def _classes(content: Any) -> Classes:
    if not isinstance(content, dict) or set(content) != {"classes"}:
        raise ValueError("the file must be a mapping with the one key 'classes'")
    if not isinstance(content["classes"], dict) or not content["classes"]:
        raise ValueError("'classes' must be a mapping of names to classes")
    found: dict[int, PriorityClass] = {}
    for name, values in content["classes"].items():
        made = _class(name, values)
        if (other := found.get(made.priority)) is not None:
            raise ValueError(
                f"the classes {other.name} and {name} have the same priority, {made.priority}"
            )
        found[made.priority] = made
    return Classes(MappingProxyType(found))


def _class(name: Any, values: Any) -> PriorityClass:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a class: use letters, digits, '_' and '-'")
    if not isinstance(values, dict):
        raise ValueError(f"class {name} must be a mapping, such as {{priority: 0}}")
    known = (*_WHOLE, *_SECONDS)
    if unknown := [str(key) for key in values if key not in known]:
        raise ValueError(f"class {name} has no {unknown[0]}; there are {', '.join(known)}")
    if "priority" not in values:
        raise ValueError(f"class {name} has no priority, which is vLLM's: the lower, the sooner")
    _check_numbers(name, values)
    if values["priority"] not in PRIORITIES:
        raise ValueError(f"the priority of class {name} has more than 64 bits")
    return PriorityClass(name, **values)


def _check_numbers(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        kinds, wanted = ((int,), "whole number") if key in _WHOLE else ((int, float), "number")
        if isinstance(value, bool) or not isinstance(value, kinds) or isnan(value):
            raise ValueError(f"{key} of class {name} must be a {wanted}, not {value!r}")
        if key != "priority" and value < 0:
            raise ValueError(f"{key} of class {name} must not be negative, but is {value}")
