"""Fig. 11: latencies of six systems on nine traces, at the paper's rates and by its rule."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.figure import make
from benchmarks.paper.numbers import exact, ratios, summary
from benchmarks.paper.options import Options
from benchmarks.paper.outcome import Outcome
from benchmarks.paper.plots import Panel, grid
from benchmarks.paper.rates import found as found_rate
from benchmarks.paper.runs import Run, run_all
from benchmarks.paper.systems import SYSTEMS
from benchmarks.paper.traces import ROWS
from llumnix.simulator.cluster import EngineConfig

NAME = "serving"
PROMPTS = (1, 256, 1024, 4096)  # tokens: where classes of prompts begin


def points(options: Options) -> list[dict[str, Any]]:
    """What is run: each trace at each of its rates."""
    made = []
    for name, row in ROWS.items():
        if row.missing(options.traces):
            continue
        rates = [(rate, "reference") for rate in row.rates] + [(found_rate(name), "rule")]
        for rate, basis in rates:
            made.append({"trace": name, "rate": rate, "basis": basis, "threshold": row.threshold})
    return made[2:5] if options.quick else made


def simulate(options: Options) -> dict[str, Any]:
    """Run everything, and work out the numbers."""
    wanted = points(options)
    runs = [
        Run(
            system.cluster(point["threshold"]),
            ROWS[point["trace"]].workload(options.requests, point["rate"], options.traces),
            seed,
        )
        for point in wanted
        for system in SYSTEMS.values()
        for seed in options.seeds
    ]
    outcomes = iter(run_all(runs, options, NAME))
    for point in wanted:
        each = {name: [next(outcomes) for _ in options.seeds] for name in SYSTEMS}
        found = {name: summary(ran) for name, ran in each.items()}
        for name, ran in each.items():
            found[name]["by_prompt"] = by_prompt(ran)
        point["systems"] = found
        point["alone"] = alone(each["infaas"])
        point["against_infaas"] = {n: ratios(found["infaas"], found[n]) for n in SYSTEMS}
        point["against_llumnix"] = {n: ratios(found["llumnix"], found[n]) for n in SYSTEMS}
    return {
        "requests": options.requests,
        "seeds": list(options.seeds),
        "skipped": [name for name, row in ROWS.items() if row.missing(options.traces)],
        "points": wanted,
    }


def alone(outcomes: list[Outcome]) -> dict[str, float]:
    """Prefill of the same requests, each on an instance of its own: what no policy is below."""
    profile = EngineConfig().latency
    prompts = np.concatenate([one.requests["prompt"] for one in outcomes])
    seconds = [profile.step_seconds(int(tokens), 0, 0) for tokens in prompts]
    return {"mean": exact(np.mean(seconds)), "p99": exact(np.quantile(seconds, 0.99))}


def by_prompt(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """The prefill of requests with prompts of similar length."""
    prompts = np.concatenate([one.requests["prompt"] for one in outcomes])
    prefill = np.concatenate([one.requests["prefill"] for one in outcomes])
    return [
        _class(low, prefill[(prompts >= low) & (prompts < high)], len(prompts))
        for low, high in zip(PROMPTS, (*PROMPTS[1:], np.inf), strict=True)
    ]


def _class(low: int, prefill: NDArray[np.float64], requests: int) -> dict[str, Any]:
    made: dict[str, Any] = {"from": low, "share": exact(len(prefill) / requests)}
    if len(prefill):
        made |= {"mean": exact(prefill.mean()), "p99": exact(np.quantile(prefill, 0.99))}
    return made


def draw(result: dict[str, Any], options: Options) -> None:
    """One row of panels for each trace: its quantities over its rates."""
    for file, names in {
        "serving": [name for name, row in ROWS.items() if row.rates],
        "serving-traces": [name for name, row in ROWS.items() if not row.rates],
    }.items():
        rows = {name: _by_rate(name, result["points"]) for name in names}
        panels = [
            [
                Panel(name, quantity, [p["rate"] for p in row], [p["systems"] for p in row])
                for quantity in (
                    "prefill mean",
                    "prefill P99",
                    "decode mean",
                    "decode P99",
                    "request mean",
                    "request P99",
                    "preemption loss",
                )
            ]
            for name, row in rows.items()
            if row
        ]
        if panels:
            grid(panels, "requests/s", options.figures / f"{file}.png")


def _by_rate(trace: str, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a trace; one of those that the reference and the rule have in common."""
    found = {point["rate"]: point for point in points if point["trace"] == trace}
    return [found[rate] for rate in sorted(found)]


def main(argv: list[str] | None = None) -> None:
    """Run, write the JSON and draw."""
    make(NAME, __doc__, argv, simulate, draw)


if __name__ == "__main__":
    main()
