"""What an engine's batch and queue must be, by what it says: compared with an engine's own."""

import random

import pytest

from llumnix.dataplane.hosted_request import HostedRequest, Order
from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.model import ModelledEngine
from llumnix.engine.sim.request import SimRequest
from llumnix.latency import PROFILES


def held(name: str, brought: int = 0, priority: int = 0, arrived: float = 0.0) -> HostedRequest:
    return HostedRequest(
        request_id=name,
        name=name,
        origin=None,  # type: ignore[arg-type]
        epoch=1,
        prompt=1,
        position=brought,
        blocks=1,
        priority=priority,
        arrived=arrived,
        pinned=None,
        brought=brought,
    )


def names(order: Order) -> list[str]:
    return [one.name for one in order.queue]


def test_who_resumes_while_another_is_prefilled() -> None:
    """The one has no output yet and runs, the other has some and waits."""
    order = Order()
    prefilled, resumed, fresh = held("a"), held("b", brought=5), held("c")
    order.add(prefilled)
    order.step(1, [])
    for one in (resumed, fresh):
        order.add(one)
    order.step(1, [])
    assert names(order) == ["b", "c"]
    order.step(1, [prefilled])
    order.remove(prefilled)
    assert names(order) == ["b", "c"]
    order.step(1, [])
    assert names(order) == ["c"]


def test_who_has_got_something_runs() -> None:
    order = Order()
    first, second = held("a"), held("b")
    for one in (first, second):
        order.add(one)
    order.step(1, [second])  # the other was preempted before it had anything
    assert names(order) == ["a"]


@pytest.mark.parametrize("by_priority", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_follows_an_engine(seed: int, by_priority: bool) -> None:
    """A small one under load, which preempts; its own queue is what is to be found."""
    draw = random.Random(seed)
    config = ModelConfig(
        total_blocks=28,
        max_num_seqs=6,
        max_num_batched_tokens=64,
        max_model_len=400,
        priority=by_priority,
        profile=PROFILES["cpu-smoke"],
    )
    engine, order, here = ModelledEngine(config), Order(by_priority), dict[str, HostedRequest]()
    preempted = 0
    for step in range(400):
        while draw.random() < 0.15:
            name, brought = f"{step}-{draw.random()}", draw.choice((0, 0, 0, 9))
            priority = draw.choice((0, 0, -1)) if by_priority else 0
            # To the model who resumes has come before all others; to vLLM, when it really came.
            came = step * 100.0 + len(here)
            here[name] = held(name, brought, priority, arrived=-came if brought else came)
            order.add(here[name])
            prompt, output = draw.randrange(1, 150), draw.randrange(10, 80)
            engine.add(
                SimRequest(
                    name,
                    range(prompt),
                    max_tokens=output,
                    generated=brought,
                    priority=priority,
                    front=brought > 0,
                )
            )
        if here and draw.random() < 0.05:
            gone = draw.choice(sorted(here))
            engine.abort([gone])
            order.remove(here.pop(gone))
        if not engine.has_work:
            continue
        result = engine.step()
        preempted += len(result.preempted)
        going_on = []
        for name, _, finish in result.outputs:
            if finish is None:
                going_on.append(here[name])
            else:
                order.remove(here.pop(name))
        order.step(engine.running, going_on)
        assert names(order) == engine.queued(), step
    assert preempted
