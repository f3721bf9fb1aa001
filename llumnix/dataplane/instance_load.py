"""The load of one instance, counted for its report from the requests that it has."""

from collections import Counter
from collections.abc import Collection, Sequence

from llumnix.cluster import InstanceId, InstanceLoad, kv_blocks
from llumnix.dataplane.hosted_request import HostedRequest
from llumnix.engine.base import EngineFacts

PRIORITIES = 64  # that a report counts by number, the most frequent ones


def count_load(
    instance: InstanceId,
    facts: EngineFacts | None,
    requests: Collection[HostedRequest],
    queue: Sequence[HostedRequest],
) -> InstanceLoad:
    """What these requests are and ask for, of which those in `queue` wait.

    What only the engine knows is not in it: the blocks in use, and how many it has preempted.
    """

    def asked(request: HostedRequest) -> int:
        """KV blocks that a request needs to run, or to run again."""
        if facts is None or not request.started:
            return request.blocks
        return kv_blocks(request.tokens, facts.block_size)

    priorities = Counter(request.priority for request in requests if request.priority)
    return InstanceLoad(
        instance,
        running=len(requests) - len(queue),
        waiting=len(queue),
        waiting_blocks=sum(map(asked, queue)),
        head_blocks=asked(queue[0]) if queue else 0,
        prefill_tokens=sum(request.tokens for request in requests if not request.started),
        preempted=sum(request.started for request in queue),
        # Clients choose the numbers; a report must not grow with them.
        priorities=dict(priorities.most_common(PRIORITIES)),
    )
