"""The cluster at one moment, with its fragmentation."""

from collections.abc import Iterable

from llumnix.simulator.instance import SimInstance
from llumnix.simulator.result import Sample


def sample(now: float, instances: Iterable[SimInstance], migrating: int) -> Sample:
    """Add up what the instances hold and want."""
    count = running = waiting = used = total = 0
    blocked = []
    for instance in instances:
        engine = instance.engine
        count += 1
        running += engine.running
        waiting += engine.waiting
        used += engine.used_blocks
        total += engine.config.total_blocks
        if engine.head_blocks > engine.free_blocks:
            blocked.append(engine.head_blocks)
    fragmented = _satisfied(blocked, total - used)
    return Sample(now, count, running, waiting, used, total, fragmented, migrating)


def _satisfied(demands: list[int], free: int) -> int:
    """How much of the demands all that is free would satisfy, the smallest first."""
    satisfied = 0
    for demand in sorted(demands):
        if satisfied + demand > free:
            break
        satisfied += demand
    return satisfied
