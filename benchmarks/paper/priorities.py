"""Fig. 13: a tenth of the requests has a high priority, in ever burstier arrivals."""

from dataclasses import replace
from typing import Any

from benchmarks.paper.figure import make
from benchmarks.paper.numbers import Selection, ratios, summary
from benchmarks.paper.options import Options
from benchmarks.paper.plots import Panel, grid
from benchmarks.paper.rates import GAMMA, found
from benchmarks.paper.runs import Run, run_all
from benchmarks.paper.systems import SYSTEMS
from benchmarks.paper.traces import ROWS
from llumnix.policy.priority_classes import PriorityClass
from llumnix.simulator.cluster import ClusterConfig

NAME = "priorities"
ROW = "S-S"
REFERENCE = 26.0  # requests/s
CVS = (2.0, 4.0, 6.0, 8.0)
HIGH = -1  # vLLM's: the lower, the sooner
SHARE = 0.1
CLASS = PriorityClass("high", HIGH, target_tokens=1600)
COMPARED = ("base", "llumnix", "ours")
PANELS = ("prefill mean", "prefill P99", "decode mean", "decode P99", "request mean", "request P99")


def cluster(name: str) -> ClusterConfig:
    """A system with priorities; the base has requests with the same tags, and takes no notice."""
    threshold = ROWS[ROW].threshold
    if name == "base":
        # SR is what Llumnix's own rule is without priorities.
        return replace(SYSTEMS["llumnix"], request="SR").cluster(threshold)
    plain = SYSTEMS[name].cluster(threshold)
    policy = SYSTEMS[name].policy(threshold, (CLASS,))
    return replace(plain, engine=replace(plain.engine, priority=True), policy=policy)


def _of(priority: int) -> Selection:
    return lambda outcome: outcome.requests["priority"] == priority


def simulate(options: Options) -> dict[str, Any]:
    """Run everything, and work out the numbers."""
    rates = [("reference", REFERENCE), ("rule", found(GAMMA))]
    wanted = [(*rate, cv) for rate in rates for cv in (CVS[:1] if options.quick else CVS)]
    runs = [
        Run(cluster(name), ROWS[ROW].workload(options.requests, rate, cv=cv, high=SHARE), seed)
        for _, rate, cv in wanted
        for name in COMPARED
        for seed in options.seeds
    ]
    outcomes = iter(run_all(runs, options, NAME))
    points = []
    for basis, rate, cv in wanted:
        each = {name: [next(outcomes) for _ in options.seeds] for name in COMPARED}
        point: dict[str, Any] = {"basis": basis, "rate": rate, "cv": cv}
        for kind, priority in (("high", HIGH), ("normal", 0)):
            numbers = {name: summary(ran, _of(priority)) for name, ran in each.items()}
            better = {name: ratios(numbers["base"], numbers[name]) for name in COMPARED}
            point[kind] = {"systems": numbers, "against_base": better}
        points.append(point)
    return {"requests": options.requests, "seeds": list(options.seeds), "points": points}


def draw(result: dict[str, Any], options: Options) -> None:
    """A row of panels for each rate and kind of request, over the CV."""
    panels = []
    for basis in ("reference", "rule"):
        points = [point for point in result["points"] if point["basis"] == basis]
        for kind in ("high", "normal"):
            title = f"{kind} @ {points[0]['rate']:g}"
            systems = [point[kind]["systems"] for point in points]
            cvs = [point["cv"] for point in points]
            panels.append([Panel(title, quantity, cvs, systems) for quantity in PANELS])
    grid(panels, "CV of the gaps", options.figures / f"{NAME}.png")


def main(argv: list[str] | None = None) -> None:
    """Run, write the JSON and draw."""
    make(NAME, __doc__, argv, simulate, draw)


if __name__ == "__main__":
    main()
