"""What a simulated instance knows of its requests."""

from math import inf

from llumnix.latency import LatencyProfile
from llumnix.simulator.cluster import EngineConfig
from llumnix.simulator.instance import SimInstance, VirtualClock
from llumnix.simulator.result import Story
from llumnix.simulator.workload import SimJob

STEP = 1.0  # seconds
# Twenty blocks of 16 tokens, and a second for each step of decoding.
ENGINE = EngineConfig(
    profile=LatencyProfile(prefill_fixed=STEP, decode_fixed=STEP),
    total_blocks=20,
    max_model_len=320,
    max_num_batched_tokens=320,
    watermark=0.0,
)


def instance(clock: VirtualClock, *jobs: SimJob) -> SimInstance:
    made = SimInstance("i", ENGINE.model(), clock)
    for job in jobs:
        made.add(Story(job))
    return made


def until_preempted(clock: VirtualClock, full: SimInstance) -> None:
    clock.run(lambda: bool(full.engine.preempted), inf)


def test_one_that_was_preempted_is_the_head_of_the_queue() -> None:
    clock = VirtualClock()
    full = instance(clock, SimJob(0, 0.0, 100, 150), SimJob(1, 0.0, 100, 150))
    until_preempted(clock, full)
    full.add(Story(SimJob(2, clock.now, 30, 5)))
    told = [(c.request, c.running, c.head) for c in full.candidates(set())]
    assert told == [("0", True, False), ("1", True, True), ("2", False, False)]


def test_the_loss_of_one_that_was_preempted_ends_with_its_next_token_wherever_that_comes() -> None:
    clock = VirtualClock()
    full, free = (
        instance(clock, SimJob(0, 0.0, 100, 150), SimJob(1, 0.0, 100, 150)),
        instance(clock),
    )
    until_preempted(clock, full)
    story = full.stories["1"]
    since, tokens = story.preempted_at, len(story.times)
    assert since is not None and not full.runs("1")
    clock.run(lambda: clock.now >= since + 3 * STEP, inf)
    free.add(full.remove("1"))
    clock.run(lambda: len(story.times) > tokens, inf)
    assert story.preemption_loss == story.times[tokens] - since - STEP >= 3 * STEP
    assert free.runs("1")
