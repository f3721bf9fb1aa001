"""A figure as a command: run, write the JSON, draw."""

from collections.abc import Callable
from typing import Any

from benchmarks.paper.files import write
from benchmarks.paper.options import Options, read_options

Result = dict[str, Any]


def make(
    name: str,
    description: str | None,
    argv: list[str] | None,
    simulate: Callable[[Options], Result],
    draw: Callable[[Result, Options], None],
) -> None:
    """Make one figure by the options that a command line gives."""
    options = read_options(description, argv)
    result = simulate(options)
    write(result, options.results, name)
    draw(result, options)
