"""A latency profile out of measured steps: relative least squares with no coefficient below 0."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llumnix.latency import LatencyProfile

Array = NDArray[np.float64]


class Step(NamedTuple):
    """One measured step of an engine. With both parts it is a mixed step, of chunked prefill."""

    prefill: int  # tokens of one prompt that are computed, none of them before
    batch: int  # requests that decode
    context: int  # tokens of these
    seconds: float


def fit(steps: Sequence[Step]) -> LatencyProfile:
    """The profile whose relative errors on the steps have the least sum of squares.

    Steps that only decode give the coefficients of decoding; what these leave of the others gives
    those of prefill. Where all prefill was measured in mixed steps, its fixed part is at least that
    of decoding: a mixed step pays the larger of the two.

    Raises:
        ValueError: no step decodes only, or none prefills, or one took no time.
    """
    decode = [step for step in steps if not step.prefill]
    prefill = [step for step in steps if step.prefill]
    if not decode or not prefill or min(step.seconds for step in steps) <= 0:
        raise ValueError("a fit needs steps with and without prefill, all of more than 0 seconds")
    d, e, f = _solve([(1, step.batch, step.context) for step in decode], decode)
    least = d if all(step.batch for step in prefill) else 0.0
    known = [least + e * step.batch + f * step.context for step in prefill]
    a, b, c = _solve([(1, step.prefill, step.prefill**2) for step in prefill], prefill, known)
    return LatencyProfile(least + a, b, c, d, e, f)


def errors(profile: LatencyProfile, steps: Sequence[Step]) -> list[float]:
    """How far the profile's time is off for each step: 0.1 is 10 % too long."""
    return [
        profile.step_seconds(step.prefill, step.batch, step.context) / step.seconds - 1
        for step in steps
    ]


def _solve(
    terms: Sequence[Sequence[float]], steps: Sequence[Step], known: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Coefficients of the terms that explain what is not `known` of the steps' seconds."""
    seconds = np.array([step.seconds for step in steps])
    rest = seconds - (np.array(known) if known is not None else 0.0)
    found = _non_negative(np.array(terms, dtype=np.float64) / seconds[:, None], rest / seconds)
    return tuple(found.tolist())


def _non_negative(matrix: Array, target: Array) -> Array:
    """Least squares over x >= 0: the best of all sets of columns that need no negative one."""
    columns = matrix.shape[1]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)  # a square beside a 1 is ill-conditioned
    best, least = np.zeros(columns), float(target @ target)
    for count in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), count)):
            found, *_ = np.linalg.lstsq(matrix[:, chosen] / scale[chosen], target, rcond=None)
            left = target - matrix[:, chosen] / scale[chosen] @ found
            if found.min() >= 0 and float(left @ left) < least:
                best, least = np.zeros(columns), float(left @ left)
                best[chosen] = found / scale[chosen]
    return best
