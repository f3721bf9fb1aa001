"""When requests come."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from llumnix.simulator.arrivals import ArrivalProcess


@given(st.sampled_from([0.5, 1.0, 2.0, 6.0]), st.floats(0.1, 100), st.integers(0, 9))
def test_another_rate_stretches_the_same_times(cv: float, rate: float, seed: int) -> None:
    slow = ArrivalProcess("gamma", rate, cv).times(50, default_rng(seed))
    fast = ArrivalProcess("gamma", rate * 2, cv).times(50, default_rng(seed))
    assert slow[0] == 0 and (np.diff(slow) >= 0).all()
    assert np.allclose(slow, fast * 2)


@pytest.mark.parametrize("cv", [1.0, 2.0, 4.0])
def test_gamma_has_its_rate_and_variation(cv: float) -> None:
    gaps = np.diff(ArrivalProcess("gamma", 26, cv).times(200_000, default_rng(1)))
    assert 1 / gaps.mean() == pytest.approx(26, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_poisson_has_its_rate_and_a_variation_of_one() -> None:
    gaps = np.diff(ArrivalProcess("poisson", 32).times(100_000, default_rng(1)))
    assert 1 / gaps.mean() == pytest.approx(32, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.02)


def test_uniform_and_burst() -> None:
    assert ArrivalProcess("uniform", 4).times(3, default_rng(0)).tolist() == [0, 0.25, 0.5]
    assert ArrivalProcess("burst").times(3, default_rng(0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "process, rate, cv, named",
    [
        ("poisson", None, None, "rate"),
        ("burst", 1.0, None, "rate"),
        ("gamma", 1.0, None, "cv"),
        ("poisson", 1.0, 2.0, "cv"),
        ("poisson", 0.0, None, "rate"),
        ("gamma", 1.0, -1.0, "cv"),
    ],
)
def test_what_makes_no_sense(process, rate, cv, named) -> None:
    with pytest.raises(ValueError, match=named):
        ArrivalProcess(process, rate, cv)
