"""What a policy decides by, beside the view of the cluster: thresholds, classes, step times."""

from dataclasses import dataclass, field

from llumnix.latency import LatencyProfile
from llumnix.policy.priority_classes import NO_CLASSES, Classes


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From which freeness on instances give and take; all in KV blocks a request.

    Source: the artifact of Llumnix (OSDI'24) and its first public implementation have one number
    for both sides, 3 blocks of 16 tokens a request (10 in two of the artifact's workloads).

    Raises:
        ValueError: an instance could be on both sides, or the gain wanted is negative.
    """

    out_below: float = 3.0
    in_above: float = 3.0
    # How much freer a destination must be than its source. A request of k blocks that comes or ends
    # changes the freeness F of a batch of B by about (F + k) / B: with some tens of each, by one.
    # So chance turns a smaller difference round between a report and the end of a move. One block a
    # request is also a block's length more of decoding for each request of the source, against the
    # two steps or so that the move costs one of them.
    min_gain: float = 1.0
    # An instance that drains must put its requests somewhere: anywhere with free memory.
    drain_above: float = 0.0

    def __post_init__(self) -> None:
        if not self.out_below <= self.in_above:
            raise ValueError(
                f"instances give away below a freeness of {self.out_below}, so they can't take "
                f"above {self.in_above}"
            )
        if not self.min_gain >= 0:
            raise ValueError(f"the gain wanted of a move is {self.min_gain}, but can't be negative")


@dataclass(frozen=True, slots=True)
class Terms:
    """The operator's side of every decision; the same on all nodes of a cluster."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    classes: Classes = NO_CLASSES
    # How long the engines' steps take; all zero where nobody has measured it.
    latency: LatencyProfile = field(default_factory=LatencyProfile)


TERMS = Terms()
