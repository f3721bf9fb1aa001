"""The requests of an instance as the rules of policy/select know them."""

from llumnix.cluster import kv_blocks
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.policy.select import MovableRequest


def candidates(hosted: HostedInstance) -> list[MovableRequest]:
    """Those that may move away from it, in the order in which they came."""
    size = hosted.facts.block_size if hosted.facts else 1
    queue = hosted.order.queue
    inside = frozenset(tenant.request_id for tenant in queue)
    waiting = frozenset(tenant.request_id for tenant in queue if not tenant.started)
    head = queue[0].request_id if queue else None  # which may be one that was preempted
    return [
        MovableRequest(
            request=tenant.request_id,
            priority=tenant.priority,
            tokens=tenant.tokens,
            blocks=kv_blocks(tenant.tokens, size),
            running=tenant.request_id not in waiting,
            order=order,
            generated=tenant.position,
            head=tenant.request_id == head,
            queued=tenant.request_id in inside,
        )
        for order, tenant in enumerate(hosted.tenants)
        if tenant.stuck is None and not tenant.leaving
    ]
