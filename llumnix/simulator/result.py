"""What a simulated run leaves behind: every request's story, and the cluster's over time."""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from llumnix.cluster import InstanceId
from llumnix.simulator.workload import SimJob


class Hop(NamedTuple):
    """One move of a request that was made."""

    at: float  # seconds from the beginning of the run: when it goes on at the destination
    source: InstanceId
    destination: InstanceId
    downtime: float  # seconds of its last copy and hand-over, as modelled
    blocks: int  # KV blocks that were copied


@dataclass(slots=True, eq=False)
class Story:
    """A request from its arrival to its end; times in seconds from the beginning of the run."""

    job: SimJob
    instance: InstanceId = ""  # to which it was dispatched
    times: "array[float]" = field(default_factory=lambda: array("d"))  # of each output token
    preemptions: int = 0
    preemption_loss: float = 0.0  # seconds from being preempted to the step of the next token
    hops: list[Hop] = field(default_factory=list)
    preempted_at: float | None = None  # until its next token, wherever that comes

    @property
    def ended(self) -> bool:
        """Whether all its tokens came."""
        return len(self.times) >= self.job.output

    @property
    def prefill(self) -> float:
        """Seconds from the arrival to the first token: TTFT."""
        return self.times[0] - self.job.at

    @property
    def decode(self) -> float:
        """Mean seconds for each token after the first: TPOT; 0 if there is one token only."""
        further = len(self.times) - 1
        return (self.times[-1] - self.times[0]) / further if further else 0.0

    @property
    def latency(self) -> float:
        """Seconds from the arrival to the last token."""
        return self.times[-1] - self.job.at


class Sample(NamedTuple):
    """The cluster at one moment."""

    at: float  # seconds from the beginning
    instances: int  # that serve, the draining ones included
    running: int  # requests in batches
    waiting: int  # requests in queues
    used_blocks: int
    total_blocks: int
    # Free blocks that would satisfy the heads of queues if they were on one instance (Fig. 5 and 12
    # of the paper): taken in the order of growing demand, as long as all that is free suffices.
    fragmented_blocks: int
    migrating: int  # moves under way


@dataclass(slots=True, eq=False)
class Result:
    """A whole run."""

    stories: list[Story]
    samples: list[Sample]
    seconds: float  # of virtual time until the last token
    wall_seconds: float  # that the simulation took
    instance_seconds: float  # of virtual time, summed over instances from start to end: the cost
    moves_failed: dict[str, int] = field(default_factory=dict)  # why, and how often
