"""Long prompts go to where they hold up the fewest."""

from dataclasses import replace

from llumnix.cluster import InstanceInfo, InstanceLoad, InstanceState
from llumnix.latency import LatencyProfile
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import WEIGHT, Candidate, Request, by_freeness, by_interference
from llumnix.policy.load import NOTHING, InFlight
from llumnix.policy.priority_classes import Classes, PriorityClass

# 1 ms a token of prefill, 10 ms a step of decoding: prompts of more than 140 tokens are long.
TERMS = Terms(latency=LatencyProfile(prefill_token=1e-3, decode_fixed=10e-3))
INFO = InstanceInfo("i", "n", "m", InstanceState.READY, 1000, 16)
LONG, SHORT = Request(1000, 63), Request(100, 7)
FEW = InstanceLoad("i", running=3, used_blocks=850)
MANY = InstanceLoad("i", running=10, used_blocks=100)


def score(
    load: InstanceLoad, request: Request, sent: InFlight = NOTHING, terms: Terms = TERMS
) -> float:
    return by_interference(Candidate(INFO, load, sent), request, terms)


def test_a_long_prompt_goes_to_where_few_run() -> None:
    assert score(FEW, LONG) == -3.0 > score(MANY, LONG) == -10.0


def test_a_short_one_to_where_there_is_room() -> None:
    for load in (FEW, MANY):
        assert score(load, SHORT) == by_freeness(Candidate(INFO, load), SHORT, TERMS)


def test_without_step_times_no_prompt_is_long() -> None:
    assert score(FEW, LONG, terms=Terms()) < score(MANY, LONG, terms=Terms())


def test_it_does_not_wait_long_for_other_prompts() -> None:
    queued = InstanceLoad("i", running=1, used_blocks=100, prefill_tokens=500)
    assert score(queued, LONG) == -(WEIGHT * 0.5 + 1.0)
    assert score(InstanceLoad("i", 1), LONG, InFlight(1, 10, 500)) == -(WEIGHT * 0.5 + 1.0)
    assert score(queued, LONG) < score(FEW, LONG)


def test_it_goes_where_it_fits_if_it_fits_anywhere() -> None:
    full, fuller = (InstanceLoad("i", running=1, used_blocks=n) for n in (950, 995))
    assert score(MANY, LONG) > score(full, LONG) > score(fuller, LONG)
    assert score(full, SHORT) > score(fuller, SHORT)
    assert score(full, SHORT) > score(fuller, SHORT, terms=Terms()), "without step times too"


def test_those_that_run_there_keep_room_to_grow() -> None:
    # 63 blocks more leave 10 blocks to each of 30 requests, to 20 of them only nine tenths.
    loads = [InstanceLoad("i", n, used_blocks=u) for n, u in ((29, 637), (19, 919), (1, 950))]
    roomy, tight, full = (score(load, LONG) for load in loads)
    assert roomy == -29.0 > tight > full


def test_room_that_a_class_keeps_free_is_not_given_away() -> None:
    high = PriorityClass("high", -1, headroom_tokens=60 * 16)
    terms = replace(TERMS, classes=Classes({-1: high}))
    one = InstanceLoad("i", running=1, used_blocks=900, priorities={-1: 1})
    for request in (LONG, SHORT):
        assert score(one, request, terms=terms) < score(FEW, request, terms=terms)
        assert score(one, request._replace(priority=-1), terms=terms) > -(2.0**40)
