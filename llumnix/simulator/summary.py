"""A run in a few numbers, for all requests and for each priority, and these as a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

import numpy as np

from llumnix.simulator.result import Result, Sample, Story


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over requests or moves; all NaN if there is none of them."""

    mean: float
    p50: float
    p99: float
    worst: float


@dataclass(frozen=True, slots=True)
class Group:
    """Requests together; times in seconds.

    Prefill is that of requests with a first token, decode that of ended ones with more than one
    token, latency that of ended ones. The preemption loss is the paper's (Llumnix, OSDI'24) less
    the recomputation: the waits from each preemption to the step that brings the next token,
    divided by all requests.
    """

    requests: int
    ended: int
    prefill: Spread  # TTFT
    decode: Spread  # TPOT
    latency: Spread  # from the arrival to the last token
    preemptions: int
    preempted: float  # share of the requests that were, once at least
    preemption_loss: float  # mean
    moves: int
    downtime: Spread  # of moves


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole run; times in seconds."""

    everything: Group
    by_priority: Mapping[int, Group]
    seconds: float  # of virtual time
    wall_seconds: float
    instance_seconds: float  # the cost
    mean_instances: float
    memory_load: float  # mean over samples of used_blocks / total_blocks
    fragmentation: float  # mean over samples of fragmented_blocks / total_blocks
    moves_failed: Mapping[str, int]  # why, and how often


def summarize(result: Result) -> Summary:
    """The numbers of a run."""
    by_priority: dict[int, list[Story]] = {}
    for story in result.stories:
        by_priority.setdefault(story.job.priority, []).append(story)
    return Summary(
        everything=_group(result.stories),
        by_priority={priority: _group(one) for priority, one in sorted(by_priority.items())},
        seconds=result.seconds,
        wall_seconds=result.wall_seconds,
        instance_seconds=result.instance_seconds,
        mean_instances=result.instance_seconds / result.seconds if result.seconds else nan,
        memory_load=_share(result.samples, lambda sample: sample.used_blocks),
        fragmentation=_share(result.samples, lambda sample: sample.fragmented_blocks),
        moves_failed=dict(result.moves_failed),
    )


def _group(stories: Sequence[Story]) -> Group:
    ended = [story for story in stories if story.ended]
    hops = [hop for story in stories for hop in story.hops]
    return Group(
        requests=len(stories),
        ended=len(ended),
        prefill=spread([story.prefill for story in stories if story.times]),
        decode=spread([story.decode for story in ended if len(story.times) > 1]),
        latency=spread([story.latency for story in ended]),
        preemptions=sum(story.preemptions for story in stories),
        preempted=_mean([float(story.preemptions > 0) for story in stories]),
        preemption_loss=_mean([story.preemption_loss for story in stories]),
        moves=len(hops),
        downtime=spread([hop.downtime for hop in hops]),
    )


def spread(values: Sequence[float]) -> Spread:
    """Mean, median, P99 (interpolated linearly) and the greatest of some values."""
    if not values:
        return Spread(nan, nan, nan, nan)
    p50, p99, worst = np.quantile(values, (0.5, 0.99, 1.0)).tolist()
    return Spread(_mean(values), p50, p99, worst)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else nan


def _share(samples: Sequence[Sample], blocks: Callable[[Sample], int]) -> float:
    return _mean([blocks(one) / one.total_blocks for one in samples if one.total_blocks])


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
