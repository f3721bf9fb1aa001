"""The numbers of a run, out of what its clients saw."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cluster.load import Row
from benchmarks.cluster.workload import Planned


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest-rank percentile: the least value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, P99 and the largest; nothing for no values."""
    if not values:
        return {}
    numbers = {"mean": statistics.fmean(values), "p50": percentile(values, 50)}
    numbers |= {"p99": percentile(values, 99), "max": max(values)}
    return {name: round(value, 5) for name, value in numbers.items()}


def waits(rows: Sequence[Row], requests: Sequence[Planned], until: float) -> list[float]:
    """Times to the first token, of all requests that no error ended.

    Who had none when the run's time was over has waited at least that long, and counts with that:
    to leave it out would make an overloaded system look good.
    """
    return [
        row.first or until - requests[row.number].at
        for row in rows
        if row.ok or row.error == "unfinished"
    ]


def figures(rows: Sequence[Row], requests: Sequence[Planned], until: float) -> dict[str, Any]:
    """Seconds and counts; rates are of what was completed."""
    good = [row for row in rows if row.ok]
    errors = Counter(row.error for row in rows if row.error and row.error != "unfinished")
    tokens = sum(requests[row.number].output for row in good)
    ends = [requests[row.number].at + row.last for row in good]
    seconds = max(ends, default=0.0)
    window = requests[-1].at
    return {
        "requests": len(requests),
        "failed": errors.total(),
        "unfinished": sum(row.error == "unfinished" for row in rows),
        "errors": dict(errors.most_common(3)),
        "ttft": spread(waits(rows, requests, until)),
        "tpot": spread([tpot for row in good if (tpot := per_token(row, requests)) is not None]),
        "gap": spread([row.gap for row in good if row.events > 1]),
        "e2e": spread([row.last for row in good]),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "tokens_per_second_while_offered": round(_by(window, good, requests) / window, 1)
        if window
        else 0.0,
        "events_per_token": round(sum(row.events for row in good) / tokens, 3) if tokens else 0.0,
        "client_late": spread([row.late for row in rows]),
    }


def per_token(row: Row, requests: Sequence[Planned]) -> float | None:
    """Seconds for each token after the first one."""
    further = requests[row.number].output - 1
    return (row.last - row.first) / further if further else None


def _by(end: float, rows: Sequence[Row], requests: Sequence[Planned]) -> float:
    """Tokens that had come at a time, if those of a request come evenly."""
    tokens = 0.0
    for row in rows:
        at, further = requests[row.number].at, requests[row.number].output - 1
        elapsed = end - at - row.first
        if elapsed >= 0:
            tokens += 1 + further * min(elapsed / max(row.last - row.first, 1e-9), 1.0)
    return tokens


def samples(rows: Sequence[Row], requests: Sequence[Planned]) -> dict[str, list[float | None]]:
    """Milliseconds for each request in order, for plots; null where there is nothing."""

    def ms(value: float | None) -> float | None:
        return round(value * 1e3, 1) if value else None

    return {
        "ttft": [ms(row.first) for row in rows],
        "tpot": [ms(per_token(row, requests)) if row.ok else None for row in rows],
        "gap": [ms(row.gap) if row.ok else None for row in rows],
        "e2e": [ms(row.last) if row.ok else None for row in rows],
    }
