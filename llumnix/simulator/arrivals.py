"""When requests come: gaps between them, drawn from a random process."""

from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

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
