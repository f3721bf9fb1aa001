"""The summary of a run as a table for people."""

from collections.abc import Callable, Mapping
from math import isnan

from llumnix.simulator.summary import Group, Summary

_GAP = "  "


def table(summary: Summary) -> str:
    """Columns: all requests, and each priority if there are several. Then the cluster, in lines."""
    groups = {"all": summary.everything}
    if len(summary.by_priority) > 1:
        groups |= {f"priority {p}": group for p, group in summary.by_priority.items()}
    rows = [["", *groups]] + [
        [name, *(cell(group) for group in groups.values())] for name, cell in _ROWS.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        _GAP.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *_cluster(summary)])


def _cluster(summary: Summary) -> list[str]:
    speed = summary.seconds / summary.wall_seconds if summary.wall_seconds else 0.0
    return [
        f"{summary.seconds:.1f} s of virtual time in {summary.wall_seconds:.1f} s ({speed:.0f}x)",
        f"{_number(summary.mean_instances)} instances on average, "
        f"{summary.instance_seconds:.0f} instance seconds",
        f"{_percent(summary.memory_load)} of KV blocks used, "
        f"{_percent(summary.fragmentation)} lost to fragmentation",
        f"{summary.everything.moves} moves; {_failed(summary.moves_failed)}",
    ]


def _failed(reasons: Mapping[str, int]) -> str:
    if not reasons:
        return "none failed"
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"{sum(reasons.values())} failed: {told}"


def _number(value: float) -> str:
    """Three digits at least; `-` where there is nothing to tell."""
    return "-" if isnan(value) else f"{value:.{2 if value >= 10 else 3}f}"


def _milliseconds(value: float) -> str:
    return _number(value * 1000)


def _percent(value: float) -> str:
    return "-" if isnan(value) else f"{value:.1%}"


_ROWS: dict[str, Callable[[Group], str]] = {
    "requests": lambda group: str(group.requests),
    "ended": lambda group: str(group.ended),
    "prefill mean (s)": lambda group: _number(group.prefill.mean),
    "prefill P50 (s)": lambda group: _number(group.prefill.p50),
    "prefill P99 (s)": lambda group: _number(group.prefill.p99),
    "decode mean (ms)": lambda group: _milliseconds(group.decode.mean),
    "decode P50 (ms)": lambda group: _milliseconds(group.decode.p50),
    "decode P99 (ms)": lambda group: _milliseconds(group.decode.p99),
    "request mean (s)": lambda group: _number(group.latency.mean),
    "request P50 (s)": lambda group: _number(group.latency.p50),
    "request P99 (s)": lambda group: _number(group.latency.p99),
    "preemptions": lambda group: str(group.preemptions),
    "preempted": lambda group: _percent(group.preempted),
    "preemption loss (s)": lambda group: _number(group.preemption_loss),
    "moves": lambda group: str(group.moves),
    "downtime mean (ms)": lambda group: _milliseconds(group.downtime.mean),
    "downtime P99 (ms)": lambda group: _milliseconds(group.downtime.p99),
}
