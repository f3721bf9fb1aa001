"""Numbers of runs: means and quantiles, of all seeds together and of each, and their ratios."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.outcome import Column, Outcome

Numbers = dict[str, Any]
Selection = Callable[[Outcome], NDArray[np.bool_]]  # the requests that count

TIMES = ("prefill", "decode", "latency")
# The quantities of a table: where in the numbers each is.
QUANTITIES = {
    "prefill mean": ("prefill", "mean"),
    "prefill P99": ("prefill", "p99"),
    "decode mean": ("decode", "mean"),
    "decode P99": ("decode", "p99"),
    "request mean": ("latency", "mean"),
    "request P99": ("latency", "p99"),
    "preemption loss": ("preemption_loss", "mean"),
}


def everything(outcome: Outcome) -> NDArray[np.bool_]:
    """All requests."""
    return np.ones(len(outcome.requests["at"]), dtype=bool)


def numbers(outcomes: Sequence[Outcome], which: Selection = everything) -> Numbers:
    """Of the requests of some runs together; times in seconds."""

    def column(name: str) -> Column:
        return np.concatenate([one.requests[name][which(one)] for one in outcomes])

    found: Numbers = {name: _spread(column(name)) for name in TIMES}
    found["preemption_loss"] = {"mean": exact(column("loss").mean())}
    found["preempted"] = exact((column("preemptions") > 0).mean())
    found["moves"] = exact(column("moves").mean())
    return found


def summary(outcomes: Sequence[Outcome], which: Selection = everything) -> Numbers:
    """The runs of several seeds: pooled, and each."""
    return {
        "pooled": numbers(outcomes, which),
        "seeds": [numbers([one], which) for one in outcomes],
        "memory_load": exact(np.mean([share(one, "used_blocks") for one in outcomes])),
        "fragmentation": exact(np.mean([share(one, "fragmented_blocks") for one in outcomes])),
        "seconds": exact(np.mean([one.totals["seconds"] for one in outcomes])),
    }


def share(outcome: Outcome, blocks: str) -> float:
    """Blocks as a share of all, on average until the last request comes."""
    samples = outcome.samples
    loaded = samples["at"] <= outcome.requests["at"][-1]
    return float((samples[blocks] / samples["total_blocks"])[loaded].mean())


def value(one: Numbers, quantity: str) -> float:
    """One quantity of `QUANTITIES` out of `numbers`."""
    name, statistic = QUANTITIES[quantity]
    return float(one[name][statistic])


def ratios(base: Numbers, other: Numbers) -> Numbers:
    """How many times better the other is: pooled, and the least and most of the seeds."""
    found = {}
    for quantity in QUANTITIES:
        each = [
            _ratio(value(a, quantity), value(b, quantity))
            for a, b in zip(base["seeds"], other["seeds"], strict=True)
        ]
        pooled = _ratio(value(base["pooled"], quantity), value(other["pooled"], quantity))
        known = [one for one in each if one is not None]
        low, high = (min(known), max(known)) if len(known) == len(each) else (None, None)
        found[quantity] = {"pooled": pooled, "low": low, "high": high}
    return found


def exact(number: Any) -> float:
    """Six digits, which is more than there is to know."""
    return float(f"{float(number):.6g}")


def _ratio(a: float, b: float) -> float | None:
    return exact(a / b) if b > 0 else None


def _spread(values: Column) -> Numbers:
    known = values[~np.isnan(values)]
    if not len(known):
        return dict.fromkeys(("mean", "p50", "p99"))
    p50, p99 = np.quantile(known, (0.5, 0.99))
    return {"mean": exact(known.mean()), "p50": exact(p50), "p99": exact(p99)}
