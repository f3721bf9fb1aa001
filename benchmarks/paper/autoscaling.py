"""Fig. 14 and 15: the cluster grows and shrinks with its load; latency against cost."""

from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.paper.figure import make
from benchmarks.paper.numbers import Numbers, exact, summary
from benchmarks.paper.options import Options
from benchmarks.paper.outcome import Outcome
from benchmarks.paper.plots import lines, save
from benchmarks.paper.runs import Run, run_all
from benchmarks.paper.systems import SYSTEMS
from benchmarks.paper.traces import ROWS
from llumnix.policy.scaling import ScalingTerms

NAME = "autoscaling"
ROW = "L-L"
COMPARED = ("infaas", "llumnix", "ours")
INITIAL, LEAST, MOST = 8, 1, 16  # instances
LOW, WIDTH = 10.0, 50.0  # the range of the mean freeness is LOW to LOW + WIDTH
START = 20.0  # seconds until a new instance is ready: a guess of ours, the reference has none
BURSTY = 2.0  # requests/s of the points with a CV
# By figure: rate, CV (None: Poisson) and x of each point, and which of them is varied.
FIGURES: dict[str, tuple[str, list[tuple[float, float | None, float]]]] = {
    "rates": ("rate", [(rate, None, LOW) for rate in (2.0, 2.2, 2.4, 2.6, 2.8, 3.0)]),
    "burstiness": ("cv", [(BURSTY, cv, LOW) for cv in (2.0, 3.0, 4.0, 5.0, 6.0)]),
    "cost": ("low", [(BURSTY, 2.0, low) for low in (5.0, 25.0, 45.0, 65.0, 85.0)]),
}


def _run(name: str, point: tuple[float, float | None, float], requests: int, seed: int) -> Run:
    rate, cv, low = point
    scaling = ScalingTerms(low, low + WIDTH, minimum=LEAST, maximum=MOST)
    plain = SYSTEMS[name].cluster(ROWS[ROW].threshold, INITIAL)
    cluster = replace(plain, scaling=scaling, start_seconds=START)
    return Run(cluster, ROWS[ROW].workload(requests, rate, cv=cv), seed)


def simulate(options: Options) -> dict[str, Any]:
    """Run everything, and work out the numbers."""
    figures = {
        figure: points[:2] if options.quick else points for figure, (_, points) in FIGURES.items()
    }
    runs = [
        _run(name, point, options.requests, seed)
        for points in figures.values()
        for point in points
        for name in COMPARED
        for seed in options.seeds
    ]
    outcomes = iter(run_all(runs, options, NAME))
    result: dict[str, Any] = {"requests": options.requests, "seeds": list(options.seeds)}
    for figure, points in figures.items():
        result[figure] = []
        for rate, cv, low in points:
            systems = {name: _system([next(outcomes) for _ in options.seeds]) for name in COMPARED}
            result[figure].append({"rate": rate, "cv": cv, "low": low, "systems": systems})
    result["savings"] = savings(result["cost"])
    return result


def _system(outcomes: list[Outcome]) -> Numbers:
    costs = [_cost(one) for one in outcomes]
    return summary(outcomes) | {"instances": exact(np.mean(costs)), "instances_seeds": costs}


def _cost(outcome: Outcome) -> float:
    """Instances on average, until the last request comes."""
    samples = outcome.samples
    return exact(samples["instances"][samples["at"] <= outcome.requests["at"][-1]].mean())


def savings(points: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """How much less each system costs than INFaaS++ at the P99 prefill that this has.

    The cost is interpolated over the logarithm of the P99, and not beyond what was run.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for name in COMPARED[1:]:
        curve = sorted(_place(point["systems"][name]) for point in points)
        logs, costs = np.log([p99 for p99, _ in curve]), [cost for _, cost in curve]
        found[name] = []
        for p99, cost in (_place(point["systems"]["infaas"]) for point in points):
            if logs[0] <= np.log(p99) <= logs[-1]:
                other = exact(np.interp(np.log(p99), logs, costs))
                saved = exact(1 - other / cost)
                found[name].append({"p99": p99, "infaas": cost, "other": other, "saved": saved})
    return found


def _place(system: Numbers) -> tuple[float, float]:
    return system["pooled"]["prefill"]["p99"], system["instances"]


def draw(result: dict[str, Any], options: Options) -> None:
    """Latency and cost over rate and burstiness, and one against the other."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for column, name in enumerate(("rates", "burstiness")):
        varied = FIGURES[name][0]
        for row, y in enumerate(("P99 prefill (s)", "instances")):
            series = {
                system: (
                    [point[varied] for point in result[name]],
                    [_place(point["systems"][system])[row] for point in result[name]],
                )
                for system in COMPARED
            }
            lines(axes[row][column], series, varied, y)
    series = {}
    for system in COMPARED:
        places = [_place(point["systems"][system])[::-1] for point in result["cost"]]
        costs, tails = zip(*sorted(places), strict=True)
        series[system] = (list(costs), list(tails))
    lines(axes[0][2], series, "instances", "P99 prefill (s)")
    axes[0][2].set_yscale("log")
    axes[1][2].set_axis_off()
    save(figure, options.figures / f"{NAME}.png")


def main(argv: list[str] | None = None) -> None:
    """Run, write the JSON and draw."""
    make(NAME, __doc__, argv, simulate, draw)


if __name__ == "__main__":
    main()
