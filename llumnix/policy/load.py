"""How much room an instance has: virtual usage and freeness, in KV blocks.

Source: Llumnix (OSDI'24), Algorithm 1. With M the KV blocks of an instance, V the virtual usage
of its requests and B its batch size, freeness is F = (M - sum of V) / B: how many more blocks
each request can take before memory runs out, so about how many more block-lengths of decoding
the batch has left. It is negative on an overloaded instance.

Two questions are asked of it, and they count the queue differently:

- `dispatch_freeness`: where does a new request go? V is what is used, queued and in flight;
  B is running + waiting + in flight.
- `freeness`: who gives a running request away, and who takes it? V is what is used, and what the
  head of the queue asks for (which de-fragments); B is running + 1 if any request waits.

Both count the headroom of priority classes (policy/priority_classes) as used, the first one only
that of other classes than the request's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType

from llumnix.cluster import InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.priority_classes import NO_CLASSES, Classes

_NONE: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class InFlight:
    """What one node has sent to an instance that no report of the instance counts yet."""

    requests: int = 0
    blocks: int = 0  # KV blocks that these requests will ask for
    tokens: int = 0  # tokens that these requests have to prefill
    priorities: Mapping[int, int] = field(default_factory=lambda: _NONE)  # how many of each but 0

    def plus(self, blocks: int, tokens: int, priority: int = 0) -> "InFlight":
        """This, with one more request in flight."""
        return self._changed(1, blocks, tokens, priority)

    def minus(self, blocks: int, tokens: int, priority: int = 0) -> "InFlight":
        """This, with one request less in flight."""
        return self._changed(-1, -blocks, -tokens, priority)

    def _changed(self, requests: int, blocks: int, tokens: int, priority: int) -> "InFlight":
        priorities = self.priorities
        if priority:
            counts = {**priorities, priority: priorities.get(priority, 0) + requests}
            priorities = MappingProxyType({p: n for p, n in counts.items() if n > 0})
        return InFlight(
            self.requests + requests, self.blocks + blocks, self.tokens + tokens, priorities
        )


NOTHING = InFlight()


def dispatch_usage(load: InstanceLoad, sent: InFlight = NOTHING) -> int:
    """Blocks held, queued for, and on their way (V for dispatch, without headroom).

    Algorithm 1 counts the head of the queue only; for dispatch all of the queue counts, as in the
    artifact (`compute_instance_load_dispatch`): a request that queues behind others waits for all
    of them.
    """
    return load.used_blocks + load.waiting_blocks + sent.blocks


def unclaimed(info: InstanceInfo, load: InstanceLoad, sent: InFlight = NOTHING) -> int:
    """Blocks that nothing holds, queues for, or is on its way to; negative where too much is."""
    return info.total_blocks - dispatch_usage(load, sent)


def places(info: InstanceInfo, load: InstanceLoad) -> float:
    """How many requests more could be in its batch, once those that wait there are; +inf: no limit.

    That is vLLM's `max_num_seqs`, which small requests reach long before the memory is full.
    """
    if not info.max_running:
        return inf
    return max(info.max_running - load.running - load.waiting, 0)


def dispatch_freeness(
    info: InstanceInfo, load: InstanceLoad, sent: InFlight = NOTHING, headroom: int = 0
) -> float:
    """F for dispatch, in blocks a request; +inf for an instance with no request at all.

    `headroom` is what the requests there keep free of the one that is dispatched.
    """
    requests = load.running + load.waiting + sent.requests
    if requests == 0:
        return inf
    return (unclaimed(info, load, sent) - headroom) / requests


def virtual_usage(info: InstanceInfo, load: InstanceLoad, classes: Classes = NO_CLASSES) -> int:
    """V for rescheduling, in blocks: held, asked for by the head of the queue, kept as headroom.

    What is queued behind the head counts nothing (Algorithm 1).
    """
    return load.used_blocks + load.head_blocks + classes.headroom(info, load.priorities)


def freeness(info: InstanceInfo, load: InstanceLoad, classes: Classes = NO_CLASSES) -> float:
    """F for rescheduling, in blocks a request.

    +inf for an instance with no request, -inf for one that drains (the paper's stand-in
    request of infinite usage), whatever it holds.
    """
    if info.state is InstanceState.DRAINING:
        return -inf
    batch = load.running + (1 if load.waiting else 0)
    if batch == 0:
        return inf
    return (info.total_blocks - virtual_usage(info, load, classes)) / batch
