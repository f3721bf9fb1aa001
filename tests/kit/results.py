"""A run that never was, to be told of."""

from array import array

from llumnix.simulator.result import Hop, Result, Sample, Story
from llumnix.simulator.workload import SimJob


def story(
    number: int,
    *gaps: float,
    output: int | None = None,
    priority: int = 0,
    hops: tuple[Hop, ...] = (),
    loss: float = 0.0,
) -> Story:
    """A request that came at `number` seconds, with these gaps before its tokens."""
    times = array("d")
    at = float(number)
    for gap in gaps:
        at += gap
        times.append(at)
    job = SimJob(number, float(number), 10, len(gaps) if output is None else output, priority)
    return Story(job, "i0", times, int(loss > 0), loss, list(hops))


def sample(at: float, used: int = 50, fragmented: int = 10, total: int = 100) -> Sample:
    return Sample(at, 2, 3, 1, used, total, fragmented, 0)


def result() -> Result:
    """Four requests, of which one is moved, one preempted, and one does not end."""
    return Result(
        stories=[
            story(0, 1.0, 0.1, 0.1, hops=(Hop(1.15, "i0", "i1", 0.02, 7),)),
            story(1, 2.0, 0.3, loss=4.0),
            story(2, 3.0, priority=-1),
            story(3, output=5),
        ],
        samples=[sample(0.0), sample(5.0, used=70, fragmented=30), sample(10.0, 0, 0, 0)],
        seconds=10.0,
        wall_seconds=0.5,
        instance_seconds=20.0,
        moves_failed={"no room": 2, "ended": 1},
    )
