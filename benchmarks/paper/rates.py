"""Rates by the paper's own rule: P50 without queuing, P99 of prefill within tens of seconds.

The modelled engine has none of the overheads of vLLM 0.1.7, so that at the paper's rates it is less
loaded than theirs was. So the rate at which Llumnix, with seed 1, has a P99 prefill of about 10 s
is looked for: in steps of a tenth, then by bisection, on three digits of the rate.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import log
from typing import Any

from benchmarks.paper.files import read, write
from benchmarks.paper.numbers import numbers
from benchmarks.paper.options import ROOT, Options, read_options
from benchmarks.paper.runs import Run, run
from benchmarks.paper.systems import SYSTEMS
from benchmarks.paper.traces import ROWS, Row

NAME = "rates"
TARGET, LEAST, MOST = 10.0, 5.0, 20.0  # seconds of P99 prefill
NEAR = (8.0, 12.5)  # seconds; what ends the search
STEPS = 9  # in one direction, and then of bisection, at most
SEED = 1
Tried = dict[float, tuple[float, float]]  # P50 and P99 of the prefill by rate
# A row of the priorities' figure: gamma arrivals of the middle CV.
GAMMA, CV = "S-S, CV 4", 4.0


def search(name: str, options: Options) -> dict[str, Any]:
    """The rate of one row, and all that was tried for it."""
    row, cv = (ROWS["S-S"], CV) if name == GAMMA else (ROWS[name], None)
    tried: Tried = {}

    def above(rate: float) -> bool:
        tried[rate] = _prefill(row, rate, cv, options)
        print(f"{name} @ {rate}: P99 {tried[rate][1]:.2f} s", file=sys.stderr)
        return tried[rate][1] > TARGET

    _bracket_and_halve(row.guess, above, tried)
    rate = min(tried, key=lambda one: abs(log(tried[one][1] / TARGET)))
    p50, p99 = tried[rate]
    return {
        "rate": rate,
        "prefill_p50": p50,
        "prefill_p99": p99,
        "kept": LEAST <= p99 <= MOST,  # the rule
        "tried": [[one, p] for one, (_, p) in sorted(tried.items())],
    }


def _bracket_and_halve(guess: float, above: Callable[[float], bool], tried: Tried) -> None:
    """Try rates until one is near the target, or there is none between two that are not."""
    low = high = guess
    factor = 1 / 1.1 if above(guess) else 1.1
    for _ in range(STEPS):
        further = _digits((low if factor < 1 else high) * factor)
        is_above = above(further)
        low, high = (low, further) if factor > 1 else (further, high)
        if is_above == (factor > 1):
            break
        low = high = further
    for _ in range(STEPS):
        middle = _digits((low + high) / 2)
        if middle in tried or any(NEAR[0] <= p99 <= NEAR[1] for _, p99 in tried.values()):
            break
        low, high = (low, middle) if above(middle) else (middle, high)


def found(name: str) -> float:
    """The rate of a row, as committed."""
    return float(read(ROOT / "docs/results/paper", NAME)["rates"][name]["rate"])


def _prefill(row: Row, rate: float, cv: float | None, options: Options) -> tuple[float, float]:
    workload = row.workload(options.requests, rate, options.traces, cv)
    outcome = run(Run(SYSTEMS["llumnix"].cluster(row.threshold), workload, SEED), options.cache)
    prefill = numbers([outcome])["prefill"]
    return prefill["p50"], prefill["p99"]


def _digits(rate: float) -> float:
    return float(f"{rate:.3g}")


def main(argv: list[str] | None = None) -> None:
    """Search for all rates, and write them down; traces that are not there keep theirs."""
    options = read_options(__doc__, argv)
    names = [name for name, row in ROWS.items() if not row.missing(options.traces)] + [GAMMA]
    if options.quick:
        names = names[:1]
    with ProcessPoolExecutor(options.jobs) as pool:
        rates = dict(zip(names, pool.map(partial(search, options=options), names), strict=True))
    kept = (read(options.results, NAME) or {"rates": {}})["rates"]
    content = {"target": TARGET, "seed": SEED, "requests": options.requests, "rates": kept | rates}
    write(content, options.results, NAME)


if __name__ == "__main__":
    main()
