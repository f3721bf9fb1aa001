"""Fig. 10: what a move costs in the simulator, beside the paper's figure and measurements."""

import json
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paper.figure import make
from benchmarks.paper.numbers import exact
from benchmarks.paper.options import ROOT, Options
from benchmarks.paper.plots import save
from llumnix.latency import PROFILES
from llumnix.simulator.cluster import COSTS

NAME = "migration"
MODEL = "llama-7b-a10"  # a key of PROFILES and of COSTS
WAYS = {"live": "downtime of a live migration", "copy": "blocking copy", "recompute": "recompute"}
# Milliseconds in the paper's Fig. 10 for LLaMA-7B, by tokens.
PAPER = {
    256: {"live": 13, "copy": 68, "recompute": 58},
    512: {"live": 12, "copy": 129, "recompute": 110},
    1024: {"live": 15, "copy": 226, "recompute": 220},
    2048: {"live": 16, "copy": 451, "recompute": 436},
    4096: {"live": 22, "copy": 909, "recompute": 940},
    8192: {"live": 26, "copy": 1682, "recompute": 1995},
}


def modelled(tokens: int) -> dict[str, float]:
    """Milliseconds in the simulator."""
    cost = COSTS[MODEL]
    seconds = {
        "live": cost.downtime(tokens),
        "copy": cost.copy(tokens),
        "recompute": PROFILES[MODEL].step_seconds(tokens, 0, 0),
    }
    return {way: exact(1e3 * one) for way, one in seconds.items()}


def measured() -> dict[str, list[dict[str, Any]]]:
    """Milliseconds of the gap in a moved stream on real engines (docs/migration.md)."""
    found = {}
    for file in sorted((ROOT / "docs/results").glob("migration-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        rows: dict[int, dict[str, Any]] = {}
        for one in content["gaps"]:
            row = rows.setdefault(one["context"], {"tokens": one["context"]})
            row[one["how"]] = exact(1e3 * one["gap"])
        found[f"{content['model']}, {content['device']}"] = list(rows.values())
    return found


def draw(result: dict[str, Any], options: Options) -> None:
    """The model's lines through the paper's points."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens of KV cache", ylabel="ms")
    tokens = [row["tokens"] for row in result["rows"]]
    for number, (way, name) in enumerate(WAYS.items()):
        colour = f"C{number}"
        axes.plot(tokens, [row["paper"][way] for row in result["rows"]], "o", color=colour)
        axes.plot(tokens, [row["model"][way] for row in result["rows"]], color=colour, label=name)
    axes.set(xscale="log", yscale="log", title="points: the paper; lines: the simulator")
    axes.set_xticks(tokens, [str(one) for one in tokens])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, options.figures / f"{NAME}.png")


def work_out(options: Options) -> dict[str, Any]:
    """The cost model beside the paper's figure, and what was measured."""
    rows = [
        {"tokens": tokens, "model": modelled(tokens), "paper": paper}
        for tokens, paper in PAPER.items()
    ]
    return {"rows": rows, "measured": measured()}


def main(argv: list[str] | None = None) -> None:
    """Work out the table, write the JSON and draw."""
    make(NAME, __doc__, argv, work_out, draw)


if __name__ == "__main__":
    main()
