"""How an option of llumnix is declared: a dataclass's field with its meaning and its bounds."""

import math
import re
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Annotated, Any, NamedTuple, get_type_hints

from llumnix.addresses import is_address

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class ConfigError(Exception):
    """A configuration that cannot work; the message is one sentence that names the option."""


class Bound(NamedTuple):
    """What values make sense: a test, and what is said of a `value` that does not pass it."""

    holds: Callable[[Any], bool]
    sentence: str


_NOT_NEGATIVE = Bound(lambda v: 0 <= v < math.inf, "must be a number of seconds, and not negative")

Seconds = Annotated[float, _NOT_NEGATIVE]
SomeSeconds = Annotated[float, Bound(lambda v: 0 < v < math.inf, "must be more than 0 seconds")]
LeaseSeconds = Annotated[
    float,
    _NOT_NEGATIVE,
    Bound(lambda v: v >= 2, "is {value}, but etcd grants 2 seconds or more"),
]
Count = Annotated[int, Bound(lambda v: v >= 0, "must not be negative")]
Several = Annotated[int, Bound(lambda v: v >= 1, "is {value}, but must be 1 or more")]
Name = Annotated[
    str,
    Bound(
        lambda v: _NAME.fullmatch(v) is not None,
        "must be letters, digits, '.', '_' and '-', not {value!r}",
    ),
]
Address = Annotated[
    str,
    Bound(
        lambda v: not v or is_address(v),
        "must be host:port, with an IPv6 address in brackets, not {value!r}",
    ),
]


def option(default: Any, text: str, **kwargs: Any) -> Any:
    """A field with a default and a text for --help; `kwargs` are argparse's, and `secret`."""
    return field(default=default, metadata={"help": text, **kwargs})


def option_name(one: "Field[Any]") -> str:
    """The option's name on a command line."""
    return f"--{one.name.replace('_', '-')}"


def check_bounds(config: Any) -> None:
    """Raise ConfigError for the first option whose value is out of the bounds of its type."""
    hints = get_type_hints(type(config), include_extras=True)
    for one in fields(config):
        value = getattr(config, one.name)
        for bound in getattr(hints[one.name], "__metadata__", ()):
            if not bound.holds(value):
                raise ConfigError(f"{option_name(one)} {bound.sentence.format(value=value)}")
