"""Fig. 12: free memory that would serve the heads of queues, were it on one instance, over time."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.paper.figure import make
from benchmarks.paper.numbers import exact, share
from benchmarks.paper.options import Options
from benchmarks.paper.outcome import Outcome
from benchmarks.paper.plots import lines, save
from benchmarks.paper.rates import found
from benchmarks.paper.runs import Run, run_all
from benchmarks.paper.systems import SYSTEMS
from benchmarks.paper.traces import ROWS

NAME = "fragmentation"
ROW = "M-M"
COMPARED = ("infaas", "llumnix", "ours")
BIN = 20  # samples, of a second each


def simulate(options: Options) -> dict[str, Any]:
    """Run the three systems at the paper's highest rate and at that of its rule."""
    row = ROWS[ROW]
    rates = {"reference": row.rates[-1], "rule": found(ROW)}
    runs = [
        Run(SYSTEMS[name].cluster(row.threshold), row.workload(options.requests, rate), seed)
        for rate in rates.values()
        for name in COMPARED
        for seed in options.seeds
    ]
    outcomes = iter(run_all(runs, options, NAME))
    points = []
    for basis, rate in rates.items():
        systems = {name: _system([next(outcomes) for _ in options.seeds]) for name in COMPARED}
        points.append({"trace": ROW, "rate": rate, "basis": basis, "systems": systems})
    return {"requests": options.requests, "seeds": list(options.seeds), "points": points}


def _system(outcomes: list[Outcome]) -> dict[str, Any]:
    """Means of each seed until the last arrival, and the first seed's over time."""
    means = [exact(share(one, "fragmented_blocks")) for one in outcomes]
    return {
        "mean": exact(np.mean(means)),
        "seeds": means,
        "used": exact(np.mean([share(one, "used_blocks") for one in outcomes])),
        "waiting": exact(np.mean([_until_last(one, "waiting").mean() for one in outcomes])),
        "over_time": _binned(outcomes[0]),
    }


def _until_last(outcome: Outcome, what: str) -> Any:
    return outcome.samples[what][outcome.samples["at"] <= outcome.requests["at"][-1]]


def _binned(outcome: Outcome) -> dict[str, list[float]]:
    at, total = (_until_last(outcome, key) for key in ("at", "total_blocks"))
    columns = {
        "at": at,
        "fragmented": _until_last(outcome, "fragmented_blocks") / total,
        "used": _until_last(outcome, "used_blocks") / total,
        "waiting": _until_last(outcome, "waiting"),
    }
    starts = range(0, len(at), BIN)
    return {
        key: [exact(column[start : start + BIN].mean()) for start in starts]
        for key, column in columns.items()
    }


def draw(result: dict[str, Any], options: Options) -> None:
    """The first seed over time: a column for each rate."""
    columns = len(result["points"])
    figure = Figure(figsize=(5.5 * columns, 7), layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False, sharex="col")
    for column, point in enumerate(result["points"]):
        for row, (what, y) in enumerate(
            (("fragmented", "share of blocks lost"), ("used", "share used"), ("waiting", "waiting"))
        ):
            series = {
                name: (one["over_time"]["at"], one["over_time"][what])
                for name, one in point["systems"].items()
            }
            lines(axes[row][column], series, "time (s)", y)
        axes[0][column].set_title(f"{point['trace']} @ {point['rate']:g}")
    save(figure, options.figures / f"{NAME}.png")


def main(argv: list[str] | None = None) -> None:
    """Run, write the JSON and draw."""
    make(NAME, __doc__, argv, simulate, draw)


if __name__ == "__main__":
    main()
