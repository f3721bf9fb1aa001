"""M-M from light load to overload: at which load rescheduling gains how much."""

from typing import Any

from benchmarks.paper.figure import make
from benchmarks.paper.numbers import ratios, summary
from benchmarks.paper.options import Options
from benchmarks.paper.plots import Panel, grid
from benchmarks.paper.runs import Run, run_all
from benchmarks.paper.systems import SYSTEMS
from benchmarks.paper.traces import ROWS

NAME = "saturation"
ROW = "M-M"
RATES = (7.8, 8.4, 8.6, 8.8, 9.2)
COMPARED = ("infaas", "llumnix", "ours")
PANELS = ("prefill mean", "prefill P99", "decode P99", "request P99", "preemption loss")


def simulate(options: Options) -> dict[str, Any]:
    """Run everything, and work out the numbers."""
    row = ROWS[ROW]
    rates = RATES[:2] if options.quick else RATES
    runs = [
        Run(SYSTEMS[name].cluster(row.threshold), row.workload(options.requests, rate), seed)
        for rate in rates
        for name in COMPARED
        for seed in options.seeds
    ]
    outcomes = iter(run_all(runs, options, NAME))
    points = []
    for rate in rates:
        found = {name: summary([next(outcomes) for _ in options.seeds]) for name in COMPARED}
        better = {name: ratios(found["infaas"], found[name]) for name in COMPARED}
        points.append({"trace": ROW, "rate": rate, "systems": found, "against_infaas": better})
    return {"requests": options.requests, "seeds": list(options.seeds), "points": points}


def draw(result: dict[str, Any], options: Options) -> None:
    """One row of panels over the rate."""
    rates = [point["rate"] for point in result["points"]]
    systems = [point["systems"] for point in result["points"]]
    row = [Panel(ROW, quantity, rates, systems) for quantity in PANELS]
    grid([row], "requests/s", options.figures / f"{NAME}.png")


def main(argv: list[str] | None = None) -> None:
    """Run, write the JSON and draw."""
    make(NAME, __doc__, argv, simulate, draw)


if __name__ == "__main__":
    main()
