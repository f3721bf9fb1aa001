"""How an option of llumnix is declared: a field of a frozen dataclass, with its meaning."""

from dataclasses import field
from typing import Any


class ConfigError(Exception):
    """A configuration that cannot work; the message is one sentence that names the knob."""


def knob(default: Any, text: str, **kwargs: Any) -> Any:
    """A field with a default and a text for --help; `kwargs` are argparse's, and `secret`."""
    return field(default=default, metadata={"help": text, **kwargs})
