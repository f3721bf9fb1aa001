"""The knee: the greatest rate of requests that a system still follows."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.cluster.figures import percentile


class Probe(NamedTuple):
    """One short run: whether the system followed, and why that was said."""

    rate: float
    held: bool
    p99: float  # seconds to the first token


class Knee(NamedTuple):
    """Where it lies: above `rate`, and below `beyond` if that was found."""

    rate: float
    beyond: float | None
    probes: list[Probe]


def search(
    probe: Callable[[float], Probe], start: float, *, ratio: float = 1.15, most: int = 6
) -> Knee:
    """Doubles or halves from `start` until it lies in between, then bisects (of the logarithm).

    Ends when both ends are within `ratio`, or after so many probes. If the system followed at no
    rate at all, half of the least one is given.
    """
    low = high = None
    rate = start
    probes: list[Probe] = []
    while len(probes) < most:
        probes.append(probe(rate))
        if probes[-1].held:
            low = rate
        else:
            high = rate
        if low is None:
            rate = rate / 2
        elif high is None:
            rate = rate * 2
        elif high / low <= ratio:
            break
        else:
            rate = three_digits(math.sqrt(low * high))
    if low is None:
        assert high is not None
        low = high / 2
    return Knee(low, high, probes)


def held(waits: Sequence[float], failed: int, bound: float) -> bool:
    """Whether nothing failed, and 99 % of the first tokens came within the bound."""
    return not failed and bool(waits) and percentile(waits, 99) < bound


def around(knee: float, shares: Sequence[float]) -> list[float]:
    """Rates at shares of the knee, of three digits: what a later call can be given to repeat."""
    return [three_digits(knee * share) for share in shares]


def three_digits(rate: float) -> float:
    """A rate that is short enough to be typed."""
    return float(f"{rate:.3g}")
