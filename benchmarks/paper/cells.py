"""What the tables of the page are made of, in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.paper.numbers import QUANTITIES, Numbers, value


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short(number: float | None, unit: float = 1.0) -> str:
    """Three digits."""
    if number is None:
        return "-"
    scaled = number * unit
    return f"{scaled:.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def cells(one: Numbers) -> list[str]:
    """The quantities of a system: seconds, but for decode, which is in ms."""
    return [short(value(one, name), 1e3 if "decode" in name else 1.0) for name in QUANTITIES]


HEAD = [f"{name} ({'ms' if 'decode' in name else 's'})" for name in QUANTITIES]


def spread(one: dict[str, Any]) -> str:
    """A ratio, pooled, with the least and the most of the seeds."""
    low, high = short(one["low"]), short(one["high"])
    return f"{short(one['pooled'])} ({low} to {high})"
