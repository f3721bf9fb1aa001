"""Dispatch by targets: what is predicted, and what follows from it."""

from llumnix.cluster import InstanceInfo, InstanceLoad, InstanceState
from llumnix.latency import LatencyProfile
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import Candidate, Request
from llumnix.policy.load import NOTHING, InFlight
from llumnix.policy.priority_classes import Classes, PriorityClass
from llumnix.policy.slo import by_slo, expected_ttft, step_seconds

# 1 ms a token of prefill; a decode step of 10 ms, 1 ms a request and 0.01 ms a token of context.
LATENCY = LatencyProfile(0.0, 1e-3, 0.0, 10e-3, 1e-3, 1e-5)
CLASSES = Classes({-1: PriorityClass("chat", -1, ttft=0.5, tpot=0.03)})
TERMS = Terms(classes=CLASSES, latency=LATENCY)
INFO = InstanceInfo("i", "n", "m", InstanceState.READY, 1000, 16)
CHAT, BATCH = Request(100, 7, -1), Request(100, 7, 0)


def score(load: InstanceLoad, request: Request, sent: InFlight = NOTHING) -> float:
    return by_slo(Candidate(INFO, load, sent), request, TERMS)


def test_an_idle_instance_needs_the_prompt_s_own_time() -> None:
    assert expected_ttft(INFO, InstanceLoad("i"), NOTHING, CHAT, TERMS) == 0.1


def test_prompts_before_it_are_prefilled_first_and_the_step_ends() -> None:
    load = InstanceLoad("i", running=5, used_blocks=100, prefill_tokens=300)
    step = 10e-3 + 5e-3 + 1600e-5
    assert step_seconds(INFO, load, NOTHING, TERMS) == step
    expected = expected_ttft(INFO, load, InFlight(0, 0, 50), CHAT, TERMS)
    assert abs(expected - (step / 2 + 0.3 + 0.05 + 0.1)) < 1e-9


def test_missing_memory_is_waited_for() -> None:
    full = InstanceLoad("i", running=10, used_blocks=1000)
    free = InstanceLoad("i", running=10, used_blocks=900)
    waits = expected_ttft(INFO, full, NOTHING, CHAT, TERMS)
    assert waits > expected_ttft(INFO, free, NOTHING, CHAT, TERMS)


def test_a_long_queue_of_prompts_is_avoided_though_there_is_more_memory() -> None:
    prefilling = InstanceLoad("i", running=2, waiting=1, used_blocks=100, prefill_tokens=2000)
    busy = InstanceLoad("i", running=4, used_blocks=400)
    assert score(busy, CHAT) > score(prefilling, CHAT)
    assert score(busy, BATCH) < score(prefilling, BATCH), "who has no target goes for the room"


def test_slow_steps_are_avoided() -> None:
    fast, slow = (InstanceLoad("i", running=n, used_blocks=100) for n in (5, 15))
    assert score(fast, CHAT) > score(slow, CHAT)


def test_who_has_no_target_goes_where_few_would_miss_theirs_for_it() -> None:
    others = InstanceLoad("i", running=20, used_blocks=600)
    for running, used, goes_to_chats in (
        (2, 30, True),  # they have time to spare
        (6, 60, False),  # they would miss it
        (20, 300, False),  # they miss it already, and would go on to
    ):
        chats = InstanceLoad("i", running=running, used_blocks=used, priorities={-1: running})
        assert (score(chats, BATCH) > score(others, BATCH)) is goes_to_chats


def test_who_has_no_target_does_not_wait_for_memory_on_that_account() -> None:
    chats = InstanceLoad("i", running=2, used_blocks=60, priorities={-1: 2})
    full = InstanceLoad("i", running=20, used_blocks=995)
    assert score(chats, BATCH) > score(full, BATCH)


def test_those_in_flight_count_as_present() -> None:
    few = InstanceLoad("i", running=2, used_blocks=60, priorities={-1: 2})
    sent = InFlight(4, 0, 0, {-1: 4})
    assert score(few, BATCH, sent) < score(few, BATCH)
    assert score(few, BATCH, sent) == score(
        InstanceLoad("i", running=6, used_blocks=60, priorities={-1: 6}), BATCH
    )
