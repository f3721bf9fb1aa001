"""Ours against Llumnix at the rates of the rule, seed by seed, with more seeds than elsewhere."""

from math import exp, log, sqrt
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.paper.figure import make
from benchmarks.paper.numbers import QUANTITIES, Numbers, exact, summary, value
from benchmarks.paper.options import Options
from benchmarks.paper.plots import save
from benchmarks.paper.rates import found
from benchmarks.paper.runs import Run, run_all
from benchmarks.paper.systems import EVERY
from benchmarks.paper.traces import ROWS

NAME = "comparison"
BASE, OTHERS = "llumnix", ("ours", "dispatch", "rescheduling")
# Not those of the other figures, from which the numbers in the policies were chosen.
SEEDS = range(101, 111)
# Of Student's distribution, two-sided at 95 %, by the number of seeds less one.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
STUDENT |= {9: 2.262, 14: 2.145, 19: 2.093}


def seeds(name: str, options: Options) -> tuple[int, ...]:
    """Ten of its own; a recorded trace is the same with any, so that fewer do for it."""
    if ROWS[name].file:
        return tuple(SEEDS)[: len(options.seeds)]
    return tuple(SEEDS)[:2] if options.quick else tuple(SEEDS)


def simulate(options: Options) -> dict[str, Any]:
    """Run everything, and work out the ratios."""
    names = [name for name, row in ROWS.items() if not row.missing(options.traces)]
    names = names[:2] if options.quick else names
    runs = [
        Run(
            EVERY[system].cluster(ROWS[name].threshold),
            ROWS[name].workload(options.requests, found(name), options.traces),
            seed,
        )
        for name in names
        for system in (BASE, *OTHERS)
        for seed in seeds(name, options)
    ]
    outcomes = iter(run_all(runs, options, NAME))
    points = []
    for name in names:
        numbers = seeds(name, options)
        base, *others = (summary([next(outcomes) for _ in numbers]) for _ in (BASE, *OTHERS))
        for system, other in zip(OTHERS, others, strict=True):
            ratios = {quantity: paired(base, other, quantity) for quantity in QUANTITIES}
            point = {"trace": name, "rate": found(name), "system": system}
            points.append(point | {"seeds": list(numbers), "ratios": ratios})
    return {"requests": options.requests, "points": points}


def paired(base: Numbers, other: Numbers, quantity: str) -> dict[str, Any]:
    """How many times better the other is: geometric mean over the seeds, with its interval."""
    pairs = zip(base["seeds"], other["seeds"], strict=True)
    values = [(value(a, quantity), value(b, quantity)) for a, b in pairs]
    each = [a / b for a, b in values if a > 0 and b > 0]
    pooled = [value(one["pooled"], quantity) for one in (base, other)]
    made: dict[str, Any] = {
        "seeds": [exact(ratio) for ratio in each],
        "better": sum(ratio > 1 for ratio in each),
        "pooled": exact(pooled[0] / pooled[1]) if pooled[1] > 0 else None,
    }
    if len(each) > 1:
        logs = np.log(each)
        mean, error = float(logs.mean()), float(logs.std(ddof=1)) / sqrt(len(each))
        wide = error * STUDENT.get(len(each) - 1, STUDENT[max(STUDENT)])
        made |= {
            "mean": exact(exp(mean)),
            "low": exact(exp(mean - wide)),
            "high": exact(exp(mean + wide)),
        }
    return made


def draw(result: dict[str, Any], options: Options) -> None:
    """Each seed a point, the mean and its interval a line, for each trace."""
    quantities = ("prefill mean", "prefill P99", "decode P99", "request mean")
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    names = list(dict.fromkeys(point["trace"] for point in result["points"]))
    every = figure.subplots(1, len(quantities), sharey=True)
    for axes, quantity in zip(every, quantities, strict=True):
        for point in result["points"]:
            of, ratio = OTHERS.index(point["system"]), point["ratios"][quantity]
            place = names.index(point["trace"]) + 0.25 * (of - 1)
            places = [place] * len(ratio["seeds"])
            axes.plot([log(r, 2) for r in ratio["seeds"]], places, f"C{2 * of}.", ms=3)
            if "mean" in ratio:
                ends = [log(ratio["low"], 2), log(ratio["high"], 2)]
                name = EVERY[point["system"]].label if point["trace"] == names[0] else None
                axes.plot(ends, [place] * 2, f"C{2 * of + 1}", lw=3, label=name)
        axes.axvline(0, color="black", lw=0.8)
        axes.set(title=quantity, xlabel="times better")
        ticks = range(-2, 4)
        axes.set_xticks(ticks, [f"{2.0**tick:g}" for tick in ticks])
        axes.set_yticks(range(len(names)), names)
        axes.grid(alpha=0.3)
    every[-1].legend(fontsize=7)
    save(figure, options.figures / f"{NAME}.png")


def main(argv: list[str] | None = None) -> None:
    """Run, write the JSON and draw."""
    make(NAME, __doc__, argv, simulate, draw)


if __name__ == "__main__":
    main()
