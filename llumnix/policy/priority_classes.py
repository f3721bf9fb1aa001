"""Priority classes: who goes first, and how much room is kept around a request that runs.

A request has one number, vLLM's priority: the lower, the sooner. That is its scheduling priority,
in the queue of an instance. A class adds execution priority to the number: headroom, which keeps
the instances of its requests from filling up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType

from llumnix.cluster import InstanceInfo

PRIORITIES = range(-(2**63), 2**63)  # that vLLM takes


@dataclass(frozen=True, slots=True)
class PriorityClass:
    """What the requests of one priority get.

    Of `headroom_tokens` and `target_tokens` at most one is given. The second says the same from the
    other side: up to how many tokens of KV cache an instance that has such a request should be
    loaded (the artifact of Llumnix, OSDI'24: 1,600 for a high priority).

    Raises:
        ValueError: both are given, or a number is negative.
    """

    name: str
    priority: int = 0
    headroom_tokens: int = 0
    target_tokens: int | None = None
    ttft: float = inf  # seconds until the first token that its clients expect
    tpot: float = inf  # seconds for each further one

    def __post_init__(self) -> None:
        if self.headroom_tokens and self.target_tokens is not None:
            raise ValueError(f"class {self.name} has both a headroom and a target load")
        if self.priority == 0 and self.keeps_headroom:
            # Nobody counts the requests of priority 0: they are those that nobody has set apart.
            raise ValueError(f"class {self.name} keeps headroom, so its priority can't be 0")
        numbers = (self.headroom_tokens, self.target_tokens or 0, self.ttft, self.tpot)
        if min(numbers) < 0:
            raise ValueError(f"class {self.name} has a negative number")

    @property
    def keeps_headroom(self) -> bool:
        """Whether its requests keep room around them."""
        return self.headroom_tokens > 0 or self.target_tokens is not None

    def headroom(self, info: InstanceInfo) -> int:
        """The KV blocks that its requests keep free around them on an instance, together."""
        if self.target_tokens is not None:
            return max(info.total_blocks - self.target_tokens // info.block_size, 0)
        return -(-self.headroom_tokens // info.block_size)


DEFAULT = PriorityClass("default")


@dataclass(frozen=True, slots=True)
class Classes:
    """All classes of a cluster; a priority that none of them has gets nothing special."""

    by_priority: Mapping[int, PriorityClass] = field(default_factory=lambda: MappingProxyType({}))

    def of(self, priority: int) -> PriorityClass:
        """The class of a request with this priority."""
        return self.by_priority.get(priority, DEFAULT)

    def headroom(self, info: InstanceInfo, present: Mapping[int, int]) -> int:
        """The KV blocks that requests keep free around them on an instance.

        `present` counts its requests by priority. The headroom of a class is the same for one
        request and for many (Algorithm 1 divides it by their number, and sums it up again).
        """
        if not self.by_priority or not present:
            return 0
        return sum(self.of(p).headroom(info) for p, count in present.items() if count)

    def added(self, info: InstanceInfo, present: Mapping[int, int]) -> Mapping[int, int]:
        """What one request more would keep free there, by priority of the classes that do.

        Nothing more, where a request of its class is present: see `headroom`.
        """
        return {
            priority: 0 if present.get(priority) else made.headroom(info)
            for priority, made in self.by_priority.items()
            if made.keeps_headroom
        }


NO_CLASSES = Classes()
