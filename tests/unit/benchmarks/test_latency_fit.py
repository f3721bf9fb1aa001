"""The coefficients of a latency profile come back out of the steps that it makes."""

import random

import pytest

from benchmarks.latency_fit import Step, errors, fit
from llumnix.latency import PROFILES, LatencyProfile

PREFILLS = (32, 128, 512, 1024, 2048)
DECODES = ((1, 128), (8, 1024), (8, 16_384), (64, 32_768), (128, 65_536))


def steps_of(profile: LatencyProfile, mixed_with: tuple[int, int] = (0, 0)) -> list[Step]:
    """What an engine with this profile would show."""
    work = [(0, *decode) for decode in DECODES] + [(n, *mixed_with) for n in PREFILLS]
    return [Step(*one, profile.step_seconds(*one)) for one in work]


@pytest.mark.parametrize("name", ["llama-7b-a10", "llama-7b-h100"])
def test_exact_times_give_the_profile_back(name: str) -> None:
    """Pure steps tell all six coefficients, if nothing scatters."""
    profile = PROFILES[name]
    fitted = fit(steps_of(profile))
    assert fitted.prefill_fixed == pytest.approx(profile.prefill_fixed, rel=1e-6)
    assert fitted.prefill_token == pytest.approx(profile.prefill_token, rel=1e-6)
    assert fitted.prefill_square == pytest.approx(profile.prefill_square, rel=1e-6)
    assert fitted.decode_fixed == pytest.approx(profile.decode_fixed, rel=1e-6)
    assert fitted.decode_request == pytest.approx(profile.decode_request, rel=1e-6)
    assert fitted.decode_context == pytest.approx(profile.decode_context, rel=1e-6)


def test_mixed_steps_tell_prefill_above_the_fixed_part_of_decoding() -> None:
    """Prefill beside a decoding batch: the fixed part is the larger one, which is what is seen."""
    profile = PROFILES["llama-7b-a10"]  # decodes with a larger fixed part than it prefills with
    steps = steps_of(profile, mixed_with=(4, 1000))
    fitted = fit(steps)
    assert fitted.prefill_fixed == pytest.approx(profile.decode_fixed, rel=1e-6)
    assert fitted.prefill_token == pytest.approx(profile.prefill_token, rel=1e-6)
    assert max(map(abs, errors(fitted, steps))) < 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_scatter_makes_no_coefficient_negative(seed: int) -> None:
    """With times that scatter by 10 %, the fit stays as near, and within what is physical."""
    draw = random.Random(seed)
    steps = [
        step._replace(seconds=step.seconds * draw.uniform(0.9, 1.1))
        for step in steps_of(PROFILES["llama-7b-h100"])
    ]
    fitted = fit(steps)
    assert min(fitted.prefill_square, fitted.prefill_token, fitted.decode_context) >= 0
    assert max(map(abs, errors(fitted, steps))) < 0.2


def test_too_few_steps_are_refused() -> None:
    """Nothing is guessed."""
    steps = steps_of(PROFILES["llama-7b-h100"])
    with pytest.raises(ValueError, match="with and without prefill"):
        fit(steps[: len(DECODES)])
    with pytest.raises(ValueError, match="with and without prefill"):
        fit(steps[len(DECODES) :])
