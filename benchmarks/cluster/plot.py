"""Tables and plots from results alone: `python -m benchmarks.cluster.plot FILE… [--png FILE]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cluster.results import read, write
from benchmarks.cluster.table import Group, Rows, groups, over_seeds, report

PANELS = (
    *(("ttft", "mean"), ("ttft", "p99"), ("tpot", "mean"), ("tpot", "p99")),
    *(("gap", "p99"), ("e2e", "mean")),
)
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "gap": "longest gap", "e2e": "end to end"}


def draw(merged: dict[str, Any], file: Path) -> bool:
    """A row of panels for each workload, over the rate; False without matplotlib, or anything.

    Lines go through the means over seeds, bars from the least to the most seed.
    """
    found = groups(merged["runs"])
    if not found:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    size = (2.9 * len(PANELS), 2.6 * len(found) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(found), len(PANELS), squeeze=False)
    systems = list(dict.fromkeys(run["system"] for run in merged["runs"]))
    for across, (group, rows) in zip(axes, found.items(), strict=True):
        for one, panel in zip(across, PANELS, strict=True):
            _panel(one, rows, panel, systems)
        across[0].set_ylabel(_row(group))
    handles = {
        label: handle
        for one in axes.flat
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=75, metadata={"Software": None})
    return True


def _panel(axes: Any, rows: Rows, panel: tuple[str, str], systems: Sequence[str]) -> None:
    values: list[float] = []
    for place, system in enumerate(systems):
        points = []
        for (rate, name), runs in sorted(rows.items()):
            seeds = over_seeds(runs, *panel) if name == system else []
            if seeds:
                points.append((rate, fmean(seeds), min(seeds), max(seeds)))
        if points:
            rates, means, least, most = zip(*points, strict=True)
            axes.plot(rates, means, "o-", ms=3, color=f"C{place}", label=system)
            axes.vlines(rates, least, most, f"C{place}", alpha=0.5)
            values += means
    quantity, number = panel
    number = number if number == "mean" else number.upper()
    axes.set_title(f"{_NAMES[quantity]} {number} (ms)", fontsize=9)
    axes.set_xlabel("requests/s")
    if values and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _row(group: Group) -> str:
    return group.shape if group.cv == 1 else f"{group.shape}, CV {group.cv:g}"


def main() -> None:
    """Merge files of results, print the tables, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--base", default="llumnix-queue", help="the system to compare with")
    parser.add_argument("--table", type=Path, help="write the tables there, and do not print them")
    parser.add_argument("--json", type=Path, help="write them merged, without each request")
    parser.add_argument("--png", type=Path, help="draw the plots there")
    args = parser.parse_args()
    merged = read(args.files)
    text = report(merged, args.base)
    if args.table:
        args.table.write_text(text)
    else:
        print(text, end="")
    if args.json:
        write(merged, args.json)
    if args.png and not draw(merged, args.png):
        parser.exit(1, "nothing is drawn: there is no comparison, or matplotlib is missing\n")


if __name__ == "__main__":
    main()
