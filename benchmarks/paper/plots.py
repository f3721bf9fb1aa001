"""Grids of panels: quantities of all systems over what is varied, with the spread over seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.numbers import Numbers, value
from benchmarks.paper.systems import SYSTEMS

COLOURS = {"rr": "C7", "queue": "C5", "infaas": "C1", "llumnix": "C0", "artifact": "C9"}
COLOURS |= {"ours": "C3", "base": "C1"}


class Panel(NamedTuple):
    """One quantity: for each value of x the numbers of each system."""

    title: str
    quantity: str  # a key of numbers.QUANTITIES
    x: Sequence[float]
    systems: Sequence[dict[str, Numbers]]  # one for each x


def save(figure: Figure, file: Path) -> None:
    """Write a PNG without anything that differs between two runs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=75, metadata={"Software": None})


def grid(panels: Sequence[Sequence[Panel]], x: str, file: Path) -> None:
    """Draw the panels in rows; lines are pooled values, bars from the least to the most seed."""
    columns = len(panels[0])
    figure = Figure(figsize=(3.1 * columns, 2.5 * len(panels) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for across, row in zip(axes, panels, strict=True):
        for one, panel in zip(across, row, strict=True):
            _panel(one, panel)
        across[0].set_ylabel(row[0].title)
    for one in axes[-1]:
        one.set_xlabel(x)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    save(figure, file)


def _panel(axes: Axes, panel: Panel) -> None:
    places = range(len(panel.x))
    for name in panel.systems[0]:
        pooled = [value(one[name]["pooled"], panel.quantity) for one in panel.systems]
        spread = [
            [value(seed, panel.quantity) for seed in one[name]["seeds"]] for one in panel.systems
        ]
        colour = COLOURS[name]
        axes.plot(places, pooled, "o-", ms=3, color=colour, label=label(name))
        axes.vlines(places, [min(s) for s in spread], [max(s) for s in spread], colour, alpha=0.5)
    unit = "" if panel.title == panel.quantity else " (s)"
    axes.set_title(panel.quantity + unit, fontsize=9)
    axes.set_xticks(places, [f"{x:g}" for x in panel.x])
    values = [value(one["pooled"], panel.quantity) for x in panel.systems for one in x.values()]
    if min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def label(name: str) -> str:
    """A system as figures and tables call it."""
    return SYSTEMS[name].label if name in SYSTEMS else {"base": "Llumnix-base"}.get(name, name)


def lines(axes: Axes, series: dict[str, tuple[Any, Any]], x: str, y: str) -> None:
    """Quantities over time or another number, one line for each system."""
    for name, (places, values) in series.items():
        axes.plot(places, values, color=COLOURS.get(name), label=label(name), lw=1)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
