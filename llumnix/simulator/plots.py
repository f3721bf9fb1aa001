"""Figures of runs, from their records; several runs are drawn into the same axes."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llumnix.simulator.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes", Record, str], None]


class PlotsMissing(Exception):
    """The library that draws is not installed."""


def check_plots() -> None:
    """Raises PlotsMissing, without importing anything."""
    if find_spec("matplotlib") is None:
        raise PlotsMissing("figures need matplotlib: pip install 'llumnix[sim]'")


def save_plots(records: Mapping[str, Record], folder: Path, prefix: str = "") -> list[Path]:
    """Draw all figures as PNG files; runs are named by the keys.

    Raises:
        PlotsMissing: there is nothing to draw with.
        OSError: they cannot be written.
    """
    paths = []
    for name, figure in figures(records).items():
        paths.append(folder / f"{prefix}{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def figures(records: Mapping[str, Record]) -> dict[str, "Figure"]:
    """All figures, by name. Raises PlotsMissing."""
    check_plots()
    return {
        "ttft": _figure(records, _cdf("prefill", 1.0), "time to first token (s)", "requests"),
        "tpot": _figure(records, _cdf("decode", 1e3), "time per further token (ms)", "requests"),
        "load": _figure(records, _share("used_blocks"), "time (s)", "KV blocks used"),
        "waiting": _figure(records, _count("waiting"), "time (s)", "requests waiting"),
        "fragmentation": _figure(
            records, _share("fragmented_blocks"), "time (s)", "KV blocks lost to fragmentation"
        ),
        "instances": _figure(records, _count("instances"), "time (s)", "instances"),
    }


def _figure(records: Mapping[str, Record], draw: Draw, x: str, y: str) -> "Figure":
    # Without pyplot there is no window, and nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    for label, record in records.items():
        draw(axes, record, label)
    axes.set_ylim(bottom=0)  # now, as it ends the fitting to what is drawn
    axes.grid(alpha=0.3)
    if len(records) > 1:
        axes.legend()
    return figure


def _cdf(quantity: str, scale: float) -> Draw:
    """The share of requests with at most a value, for those that have it."""

    def draw(axes: "Axes", record: Record, label: str) -> None:
        known = [one[quantity] for one in record.requests if one[quantity] is not None]
        values = np.sort(np.array(known, dtype=np.float64)) * scale
        axes.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), label=label)
        if len(values) and values[0] > 0:
            axes.set_xscale("log")
        _as_percent(axes)

    return draw


def _share(blocks: str) -> Draw:
    """Blocks as a share of all, over time."""

    def draw(axes: "Axes", record: Record, label: str) -> None:
        total = np.maximum(record.samples["total_blocks"], 1)
        axes.step(record.samples["at"], record.samples[blocks] / total, where="post", label=label)
        _as_percent(axes)

    return draw


def _count(what: str) -> Draw:
    """A number over time."""

    def draw(axes: "Axes", record: Record, label: str) -> None:
        axes.step(record.samples["at"], record.samples[what], where="post", label=label)

    return draw


def _as_percent(axes: Any) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")
