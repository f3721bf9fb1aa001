"""A run in a few numbers, for all requests and for each priority."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan

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
