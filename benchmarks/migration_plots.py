"""Draws what `migration.py` has measured.

python benchmarks/migration_plots.py FILE FOLDER [--title TEXT]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

WAYS = {"recompute": "stop, recompute", "copy": "stop, copy, resume", "live": "live migration"}


def gaps(result: dict[str, Any], title: str, file: Path) -> None:
    """The gap in the moved stream over the length of its context."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for how, name in WAYS.items():
        rows = [row for row in result["gaps"] if row["how"] == how]
        contexts = [row["context"] for row in rows]
        line = axes.plot(contexts, [row["gap"] * 1e3 for row in rows], "o-", label=name)
        points = [(row["context"], run["gap"] * 1e3) for row in rows for run in row["runs"]]
        axes.plot(*zip(*points, strict=True), ".", color=line[0].get_color(), alpha=0.35)
        if how == "live":
            steps = [row["step"] * 1e3 for row in rows]
            goal = [2.5 * step + 10 for step in steps]
            axes.plot(contexts, steps, ":", color="grey", label="one decode step")
            axes.plot(contexts, goal, "--", color="lightgrey", label="2.5 steps + 10 ms")
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="gap, ms")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(f"Gap in the token stream: {title}", fontsize=10)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def slow_down(slow: dict[str, Any], title: str, file: Path) -> None:
    """How much slower other streams step during a migration, and what the copy itself takes."""
    ends = list(slow["slow_down"])
    figure, axes = plt.subplots(figsize=(4.5, 3.5))
    axes.bar(ends, [100 * slow["slow_down"][end] for end in ends], label="slow-down", width=0.5)
    share = 100 * slow["copy_share_of_a_core"]
    axes.axhline(share, color="black", ls="--", label="the copy's share of an engine's core")
    axes.axhline(share + 2, color="grey", ls=":", label="that and 2 %")
    axes.axhline(0, color="black", lw=0.8)
    axes.set(ylabel="%")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(f"Steps of others while {slow['context']} tokens move: {title}", fontsize=9)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Draw both plots out of one file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--title", help="what was measured; default: the model and the device")
    args = parser.parse_args()
    result = json.loads(args.file.read_text())
    title = args.title or f"{result['model']}, {result['device']}"
    args.folder.mkdir(parents=True, exist_ok=True)
    gaps(result, title, args.folder / f"{args.file.stem}-gap.png")
    if "slow_down" in result:
        slow_down(result["slow_down"], title, args.folder / f"{args.file.stem}-slow-down.png")


if __name__ == "__main__":
    main()
