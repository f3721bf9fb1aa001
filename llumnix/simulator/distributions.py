"""What is drawn at random: how long prompts and outputs are, and when requests come."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf, log
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from llumnix.simulator.traces import read_columns

Tokens = NDArray[np.int64]
LONGEST = 2**24  # tokens of a prompt or an output: more than any model takes
STEEPEST = 100.0  # of power laws: with it all lengths are the same


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same length.

    Raises:
        ValueError: it is less than 1 token, or more than `LONGEST`.
    """

    tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= LONGEST:
            raise ValueError(f"tokens must be at least 1, and at most {LONGEST:,}")

    def draw(self, count: int, generator: Generator) -> Tokens:
        """So many lengths, each at least 1 token."""
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Many short ones and a few long ones: the generator of Llumnix (OSDI'24, section 6.1).

    As in its artifact: draw k from 1 … 2 mean - 1 with p(k) ~ k^-alpha, multiply the whole sample
    so that its average is `mean`, round up, and cap. A heavy tail makes the scale of a small sample
    its own; the paper draws 10,000.

    Raises:
        ValueError: a number is out of range.
    """

    mean: int  # tokens
    alpha: float
    cap: int = 6144  # tokens

    def __post_init__(self) -> None:
        if not 0 < min(self.mean, self.cap) <= max(self.mean, self.cap) <= LONGEST:
            raise ValueError(f"mean and cap must be at least 1, and at most {LONGEST:,}")
        if not 0 < self.alpha <= STEEPEST:
            raise ValueError(f"alpha must be greater than 0, and at most {STEEPEST:g}")

    def draw(self, count: int, generator: Generator) -> Tokens:
        """So many lengths, each at least 1 token."""
        values = np.arange(1, 2 * self.mean, dtype=np.float64)
        weights = values**-self.alpha
        drawn = generator.choice(values, size=count, p=weights / weights.sum())
        scaled = np.ceil(drawn * (self.mean / drawn.mean() if count else 1.0))
        capped: Tokens = np.minimum(scaled, self.cap).astype(np.int64)
        return capped


_LEVELS = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """What is known of a data set that cannot be had: its mean and four quantiles, in tokens.

    The logarithm of the length is linear between the quantiles, and goes on above P99 as it came
    from P95. It begins where the mean comes out right. If even 1 token is too long, or P50 too
    short a beginning for that, all lengths are scaled to the mean, and the quantiles with them.
    Lengths between the quantiles are thus ours, not the data set's.

    Raises:
        ValueError: the quantiles do not grow, or something is out of range.
    """

    mean: float
    p50: float
    p80: float
    p95: float
    p99: float

    def __post_init__(self) -> None:
        if not 1 <= self.p50 < self.p80 < self.p95 < self.p99 <= LONGEST:
            raise ValueError(f"1 <= p50 < p80 < p95 < p99 <= {LONGEST:,} must be so")
        if not 1 <= self.mean <= LONGEST:
            raise ValueError(f"mean must be at least 1, and at most {LONGEST:,}")

    def draw(self, count: int, generator: Generator) -> Tokens:
        """So many lengths, each at least 1 token."""
        points = self._points(self._lowest())
        scale = self.mean / _mean(points)
        levels = generator.random(count)
        drawn = np.exp(np.interp(levels, _LEVELS, np.log(points))) * scale
        whole: Tokens = np.maximum(np.rint(drawn), 1).astype(np.int64)
        return whole

    def _points(self, lowest: float) -> list[float]:
        highest = self.p99 * (self.p99 / self.p95) ** 0.25
        return [lowest, self.p50, self.p80, self.p95, self.p99, highest]

    def _lowest(self) -> float:
        """The length at level 0 with which the mean is nearest to `mean`, by bisection."""
        low, high = 1.0, self.p50
        for _ in range(50):
            middle = (low + high) / 2
            if _mean(self._points(middle)) < self.mean:
                low = middle
            else:
                high = middle
        return low


def _mean(points: list[float]) -> float:
    """Of lengths that are log-linear between points: each piece from a to b has (b-a)/ln(b/a)."""
    mean = 0.0
    for i, (a, b) in enumerate(pairwise(points)):
        mean += (_LEVELS[i + 1] - _LEVELS[i]) * ((b - a) / log(b / a) if b > a else a)
    return mean


@dataclass(frozen=True, slots=True)
class FileLengths:
    """Lengths drawn, with replacement, from a column of a CSV file."""

    file: str
    column: str

    def draw(self, count: int, generator: Generator) -> Tokens:
        """So many lengths, each at least 1 token.

        Raises:
            SimConfigError: the file cannot be read, or has no lengths.
        """
        found = read_columns(self.file, (self.column,))
        lengths = np.array([length for (length,) in found], dtype=np.int64)
        return generator.choice(np.maximum(lengths, 1), size=count)


Lengths = Fixed | PowerLaw | Quantiles | FileLengths  # each has `draw`

# S, M and L of the paper, for prompts and outputs alike.
_GENERATED: Mapping[str, Lengths] = {
    "short": PowerLaw(128, 2.0),
    "medium": PowerLaw(256, 1.5),
    "long": PowerLaw(512, 1.15),
}

# By the names that a configuration uses. The quantiles are Table 1 of the paper: ShareGPT is its
# GPT-4 subset, BurstGPT its GPT-4 conversations.
PROMPTS: Mapping[str, Lengths] = MappingProxyType(
    {
        **_GENERATED,
        "sharegpt": Quantiles(306, 74, 348, 1484, 3388),
        "burstgpt": Quantiles(830, 582, 1427, 2345, 3549),
    }
)
OUTPUTS: Mapping[str, Lengths] = MappingProxyType(
    {
        **_GENERATED,
        "sharegpt": Quantiles(500, 487, 781, 988, 1234),
        "burstgpt": Quantiles(271, 243, 434, 669, 964),
    }
)


Process = Literal["poisson", "gamma", "uniform", "burst"]

LARGEST_CV = 1e3  # beyond it, and below its inverse, there is nothing left to draw


@dataclass(frozen=True, slots=True)
class ArrivalProcess:
    """An open-loop process: requests come whether or not earlier ones have ended.

    Gaps are exponential (poisson), of a Gamma distribution with shape 1/CV^2 and scale CV^2/rate as
    in the evaluation of Llumnix (OSDI'24), or all the same (uniform). In a burst all come at once.

    Raises:
        ValueError: a rate or cv is out of range, or given to a process that has none.
    """

    process: Process = "poisson"
    rate: float | None = None  # requests a second, on average; all but a burst need it
    cv: float | None = None  # coefficient of variation of the gaps; gamma needs it

    def __post_init__(self) -> None:
        if (self.rate is None) != (self.process == "burst"):
            raise ValueError(f"rate is for all arrivals but a burst, and these are {self.process}")
        if (self.cv is None) == (self.process == "gamma"):
            raise ValueError(f"cv is for gamma arrivals alone, and these are {self.process}")
        if self.rate is not None and not 0 < self.rate < inf:
            raise ValueError("rate must be greater than 0, and finite")
        if self.cv is not None and not 1 / LARGEST_CV <= self.cv <= LARGEST_CV:
            raise ValueError(f"cv must be between {1 / LARGEST_CV:g} and {LARGEST_CV:g}")

    def times(self, count: int, generator: Generator) -> NDArray[np.float64]:
        """Seconds of `count` arrivals, the first at 0.

        What is drawn does not depend on the rate: another rate stretches the same times.
        """
        if self.rate is None:
            return np.zeros(count)
        gaps = self._gaps(count, generator) / self.rate
        times: NDArray[np.float64] = np.cumsum(gaps) - gaps[:1].sum()
        return times

    def _gaps(self, count: int, generator: Generator) -> NDArray[np.float64]:
        """Gaps with a mean of 1, one before each arrival."""
        if self.process == "uniform":
            return np.ones(count)
        if self.cv is None:
            return generator.standard_exponential(count)
        return np.multiply(generator.standard_gamma(1 / self.cv**2, count), self.cv**2)
