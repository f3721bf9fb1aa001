"""Workloads are the same for the same seed, and one thing changes without the others."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.simulator.distributions import ArrivalProcess
from llumnix.simulator.schema import SimConfigError
from llumnix.simulator.workload import Trace, Workload, generate

DATA = Path(__file__).parent / "data"
POISSON = Workload(300, ArrivalProcess("poisson", 10), "medium", "long", priorities={-1: 0.1})
MOONCAKE = Trace(str(DATA / "mooncake.jsonl"), "mooncake")


def test_the_same_seed_makes_the_same_requests() -> None:
    assert generate(POISSON, 4) == generate(POISSON, 4)
    assert generate(POISSON, 4) != generate(POISSON, 5)


def test_requests_are_numbered_in_the_order_of_arrival() -> None:
    jobs = generate(POISSON, 0).jobs
    assert [job.number for job in jobs] == list(range(300))
    assert all(one.at <= other.at for one, other in pairwise(jobs))


@pytest.mark.parametrize(
    "changed, kept",
    [
        ({"arrivals": ArrivalProcess("gamma", 99, 4)}, ("prompt", "output", "priority")),
        ({"output": "short"}, ("at", "prompt", "priority")),
        ({"prompt": 17}, ("at", "output", "priority")),
        ({"priorities": {-1: 0.5}}, ("at", "prompt", "output")),
    ],
)
def test_one_thing_changes_alone(changed: dict[str, Any], kept: tuple[str, ...]) -> None:
    before, after = generate(POISSON, 1).jobs, generate(replace(POISSON, **changed), 1).jobs
    assert before != after
    for name in kept:
        assert [getattr(j, name) for j in before] == [getattr(j, name) for j in after]


def test_prompts_and_outputs_are_drawn_apart() -> None:
    jobs = generate(replace(POISSON, prompt="long"), 0).jobs
    assert [job.prompt for job in jobs] != [job.output for job in jobs]


def test_shares_of_priorities() -> None:
    many = replace(POISSON, requests=20_000, priorities={-1: 0.1, 5: 0.3})
    counts = Counter(job.priority for job in generate(many, 0).jobs)
    assert counts[-1] == pytest.approx(2000, rel=0.1)
    assert counts[5] == pytest.approx(6000, rel=0.1)
    assert counts[0] == pytest.approx(12_000, rel=0.1)


@given(st.integers(2, 6000), st.sampled_from(["cut", "resample"]), st.integers(0, 3))
def test_nothing_is_too_long(limit: int, too_long: Any, seed: int) -> None:
    whole = generate(POISSON, seed).jobs
    longer = [job for job in whole if job.prompt + job.output > limit]
    limited = replace(POISSON, max_tokens=limit, too_long=too_long)
    if len(longer) == len(whole) and too_long == "resample":
        with pytest.raises(SimConfigError, match="max_tokens"):
            generate(limited, seed)
        return
    jobs, count = generate(limited, seed)
    assert count == len(longer) and len(jobs) == len(whole)
    for before, after in zip(whole, jobs, strict=True):
        assert after.prompt >= 1 and after.output >= 1
        assert after.prompt + after.output <= limit
        if before not in longer:
            assert before == after


def test_a_cut_takes_the_output_first() -> None:
    wide = Workload(1, ArrivalProcess("burst"), 90, 30, max_tokens=100)
    assert generate(wide, 0).jobs[0][2:4] == (90, 10)
    assert generate(replace(wide, prompt=300), 0).jobs[0][2:4] == (99, 1)


def test_a_trace() -> None:
    jobs, too_long = generate(Workload(trace=MOONCAKE), 0)
    assert len(jobs) == 12 and too_long == 0
    assert jobs[0].hashes == tuple(range(14)) and jobs[0].block == 512


def test_the_first_requests_of_a_trace_at_another_rate() -> None:
    jobs = generate(Workload(11, trace=replace(MOONCAKE, rate=2.0)), 0).jobs
    assert len(jobs) == 11
    assert 10 / jobs[-1].at == pytest.approx(2.0)


def test_a_cut_prompt_keeps_the_hashes_of_its_blocks() -> None:
    jobs, too_long = generate(Workload(trace=MOONCAKE, max_tokens=1300), 0)
    assert too_long > 0
    assert jobs[0][2:4] == (1299, 1) and jobs[0].hashes == (0, 1, 2)


def test_lengths_of_a_trace_with_other_arrivals() -> None:
    lengths = Trace(str(DATA / "lengths.csv"), "lengths")
    jobs = generate(Workload(5, ArrivalProcess("uniform", 10), trace=lengths), 0).jobs
    assert [(job.prompt, job.output) for job in jobs[:2]] == [(34, 244), (17, 71)]
    assert jobs[1].at == 0.1


def test_more_than_a_trace_has() -> None:
    with pytest.raises(SimConfigError, match="has 12 requests, not 13"):
        generate(Workload(13, trace=MOONCAKE), 0)


def test_a_name_of_nothing() -> None:
    with pytest.raises(SimConfigError, match="prompt is 'tall', and must be of"):
        generate(replace(POISSON, prompt="tall"), 0)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"requests": 0}, "requests"),
        ({"requests": None}, "requests is missing"),
        ({"arrivals": None}, "arrivals is missing"),
        ({"output": None}, "output is missing"),
        ({"trace": MOONCAKE}, "prompt and output"),
        ({"priorities": {0: 0.7, 1: 0.4}}, "priorities"),
        ({"max_tokens": 1}, "max_tokens"),
    ],
)
def test_too_much_or_too_little(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(POISSON, **changed)


def test_times_of_a_trace_come_from_one_place() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Workload(arrivals=ArrivalProcess("burst"), trace=replace(MOONCAKE, rate=1.0))
    with pytest.raises(ValueError, match="arrivals is missing"):
        Workload(trace=Trace("a.csv", "lengths"))
