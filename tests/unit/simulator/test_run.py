"""The simulated cluster: nothing is lost, nothing is free, and the same seed is the same run."""

from dataclasses import replace
from itertools import pairwise

import pytest

from llumnix.latency import PROFILES, LatencyProfile
from llumnix.policy.decision_context import Thresholds
from llumnix.policy.priority_classes import PriorityClass
from llumnix.policy.scaling import ScalingTerms
from llumnix.simulator.cluster import COSTS, ClusterConfig, EngineConfig, PolicyConfig
from llumnix.simulator.distributions import ArrivalProcess
from llumnix.simulator.result import Result, Story
from llumnix.simulator.run import Simulation, simulate
from llumnix.simulator.workload import SimJob, Workload, generate

# Three thousand tokens of KV cache, so that engines are full, and preempt, now and then.
SMALL = EngineConfig(total_blocks=200, max_model_len=3000, max_num_batched_tokens=3000)
CHUNKED = replace(SMALL, prefill_first=False, max_num_batched_tokens=512, watermark=0.0)
TERMS = Thresholds(out_below=10, in_above=10)
SCALING = ScalingTerms(low=20.0, high=60.0, period=1.0, cooldown=2.0, maximum=8)


def jobs(requests: int = 200, seed: int = 1, rate: float = 6.0) -> list[SimJob]:
    workload = Workload(
        requests=requests,
        arrivals=ArrivalProcess("gamma", rate=rate, cv=2.0),
        prompt="medium",
        output="short",
        priorities={-1: 0.1},
        max_tokens=2900,
    )
    return generate(workload, seed).jobs


def told(result: Result) -> list[tuple[object, ...]]:
    return [(s.job, s.instance, s.times.tolist(), s.preemptions, s.hops) for s in result.stories]


@pytest.mark.parametrize("engine", [SMALL, CHUNKED], ids=["prefill first", "chunked"])
@pytest.mark.parametrize("scaling", [None, SCALING], ids=["fixed", "scaled"])
@pytest.mark.parametrize("rescheduling", ["none", "llumnix", "artifact", "lookahead"])
def test_every_request_gets_every_token(
    engine: EngineConfig, scaling: ScalingTerms | None, rescheduling: str
) -> None:
    policy = PolicyConfig(rescheduling=rescheduling, thresholds=TERMS)
    config = ClusterConfig(4, engine, policy, scaling=scaling, start_seconds=3.0)
    simulation = Simulation(config, jobs(), lambda ended: None, 0)
    result = simulation.run()
    assert len(result.stories) == 200
    for story in result.stories:
        assert len(story.times) == story.job.output
        assert story.times[0] > story.job.at
        assert all(before < after for before, after in pairwise(story.times))
        assert (story.preemption_loss > 0) == (story.preemptions > 0), "also if it moved meanwhile"
    for instance in simulation._fleet.instances.values():
        instance.engine.check()
        assert instance.idle and not instance.engine.used_blocks
    if rescheduling != "none":
        assert sum(len(story.hops) for story in result.stories) > 5
    if scaling:
        assert len({sample.instances for sample in result.samples}) > 2


def test_the_same_seed_is_the_same_run() -> None:
    config = ClusterConfig(3, SMALL, PolicyConfig(rescheduling="lookahead", thresholds=TERMS))
    first, second = (simulate(config, jobs()) for _ in range(2))
    assert told(first) == told(second) and first.samples == second.samples
    assert told(simulate(config, jobs(seed=2))) != told(first)


def test_a_request_alone_takes_what_the_profile_says() -> None:
    (story,) = simulate(ClusterConfig(1), [SimJob(0, 1.0, prompt=1000, output=3)]).stories
    profile = PROFILES["llama-7b-a10"]
    assert story.prefill == pytest.approx(profile.step_seconds(1000, 0, 0))
    steps = [profile.step_seconds(0, 1, context) for context in (1001, 1002)]
    assert story.decode == pytest.approx(sum(steps) / 2)


def test_a_move_costs_its_downtime_and_the_destination_s_next_step() -> None:
    """Two long requests on one of two instances, and a third that has ended on the other."""
    engine = replace(CHUNKED, total_blocks=100, max_model_len=1600)
    policy = PolicyConfig(
        dispatch="rr", rescheduling="llumnix", thresholds=Thresholds(40.0, 40.0), interval=0.5
    )
    work = [SimJob(0, 0.0, 300, 200), SimJob(1, 0.01, 100, 2), SimJob(2, 0.02, 300, 200)]
    result = simulate(ClusterConfig(2, engine, policy), work)
    moved = [story for story in result.stories if story.hops]
    assert len(moved) == 1
    (hop,) = moved[0].hops
    cost = COSTS["llama-7b-a10"]
    tokens = 300 + sum(time < hop.at for time in moved[0].times)
    assert hop.downtime == pytest.approx(cost.downtime(tokens))
    gap = max(after - before for before, after in pairwise(moved[0].times))
    assert cost.downtime(tokens) < gap < cost.downtime(tokens) + 0.2
    assert hop.blocks == -(-(tokens + 1) // 16)


def mean(stories: list[Story]) -> float:
    return sum(story.prefill for story in stories) / len(stories)


def test_a_class_with_headroom_is_served_sooner_than_the_rest() -> None:
    classes = (PriorityClass("high", -1, target_tokens=800),)
    policy = PolicyConfig(rescheduling="llumnix", thresholds=TERMS, classes=classes)
    engine = replace(SMALL, priority=True)
    result = simulate(ClusterConfig(3, engine, policy), jobs(300, rate=9.0))
    high = [story for story in result.stories if story.job.priority]
    others = [story for story in result.stories if not story.job.priority]
    assert mean(high) < mean(others) / 2


def test_several_dispatchers_know_their_own_requests_only() -> None:
    burst = [SimJob(n, 0.0, 16, 2) for n in range(16)]
    alone = simulate(ClusterConfig(4, policy=PolicyConfig()), burst)
    apart = simulate(ClusterConfig(4, policy=PolicyConfig(dispatchers=4)), burst)
    counts = [
        sorted([s.instance for s in r.stories].count(f"i000{i}") for i in range(4))
        for r in (alone, apart)
    ]
    assert counts[0] == [4, 4, 4, 4] and sum(counts[1]) == 16


def test_a_policy_that_is_unknown_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="no policy 'best' for rescheduling"):
        PolicyConfig(rescheduling="best")
    with pytest.raises(ValueError, match="no rule 'best'"):
        PolicyConfig(request="best")
    with pytest.raises(ValueError, match="no profile 'warp'"):
        ClusterConfig(engine=EngineConfig(profile="warp"))


def test_what_a_request_costs_beside_the_steps_delays_all_its_tokens_alike() -> None:
    """The first token's wait grows by it, the time per further token does not."""
    profile = LatencyProfile(prefill_fixed=0.25, decode_fixed=0.125, outside=0.5)
    config = ClusterConfig(1, replace(CHUNKED, profile=profile))
    (story,) = simulate(config, [SimJob(0, 0.0, 100, 3)]).stories
    assert story.times.tolist() == [0.75, 0.875, 1.0]
