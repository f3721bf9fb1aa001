"""What a server says of itself at /metrics, before and after a run."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
MOVES = "llumnix_migrations_total"
SECONDS = "llumnix_migration_seconds"
GAPS = "llumnix_migration_gap_seconds"
OPEN = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class Sample(NamedTuple):
    """One line."""

    name: str
    labels: dict[str, str]
    value: float


def parse(text: str) -> list[Sample]:
    """Prometheus' text format, as far as servers use it."""
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            name, labels, value = match.groups()
            found.append(Sample(name, dict(_LABEL.findall(labels or "")), float(value)))
    return found


def read(url: str) -> list[Sample]:
    """The samples of a server; none if it does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
            return parse(answer.read().decode())
    except (urllib.error.URLError, OSError, ValueError):
        return []


def total(samples: Iterable[Sample], name: str, **labels: str) -> float:
    """The sum of all samples of that name with those labels."""
    wanted = labels.items()
    return sum(s.value for s in samples if s.name == name and wanted <= s.labels.items())


def busy(samples: Sequence[Sample]) -> float:
    """Requests in the engines."""
    return sum(total(samples, name) for name in OPEN)


def changes(before: Sequence[Sample], after: Sequence[Sample]) -> dict[str, Any]:
    """What a run added: preemptions, and moves by outcome with their durations."""
    outcomes = sorted({s.labels.get("outcome", "") for s in after if s.name == MOVES})
    moves = {outcome: round(_added(before, after, MOVES, outcome=outcome)) for outcome in outcomes}
    return {
        "preemptions": round(_added(before, after, "vllm:num_preemptions_total")),
        "moves": {outcome: number for outcome, number in moves.items() if number},
        "move_seconds": _histogram(before, after, SECONDS),
        "move_gap_seconds": _histogram(before, after, GAPS),
    }


def _added(before: Sequence[Sample], after: Sequence[Sample], name: str, **labels: str) -> float:
    return total(after, name, **labels) - total(before, name, **labels)


def _histogram(before: Sequence[Sample], after: Sequence[Sample], name: str) -> dict[str, float]:
    """Count, mean, and the bounds of the buckets that the median and P99 are in."""
    count = _added(before, after, f"{name}_count")
    if not count:
        return {}
    bucket = f"{name}_bucket"
    bounds = sorted({float(s.labels["le"]) for s in after if s.name == bucket})
    spread = {"count": count, "mean": round(_added(before, after, f"{name}_sum") / count, 5)}
    for label, share in (("p50", 0.5), ("p99", 0.99)):
        for bound in bounds:
            upto = sum(
                sign * s.value
                for samples, sign in ((after, 1), (before, -1))
                for s in samples
                if s.name == bucket and float(s.labels["le"]) == bound
            )
            # JSON has no infinity: a bucket without an end is left out.
            if upto >= share * count and bound != float("inf"):
                spread[f"{label}_at_most"] = bound
                break
    return spread
