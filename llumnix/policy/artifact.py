"""The rules of rescheduling and dispatch as the paper's own evaluation ran them, to compare with.

Source: the artifact of Llumnix (OSDI'24), which differs from Algorithm 1 in places:
- an instance with a preempted request that has not come back gives, however free it is, and takes
  nothing; else one threshold parts givers from takers;
- the usage counts what the whole queue asks for, not its head only, and 1 % of the blocks as used;
- the i-th least free is paired with the i-th freest, and nobody looks at the load after the move;
- a request of high priority avoids the instances without such requests, and all others those with.
"""

from math import inf

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import Candidate, Request
from llumnix.policy.dispatch_state import is_candidate
from llumnix.policy.load import dispatch_usage
from llumnix.policy.rebalance import UNCHECKED, Allowed, Pair, fit, is_draining

WATERMARK = 0.01  # share of the KV blocks that its memory manager keeps free


def artifact_freeness(info: InstanceInfo, load: InstanceLoad, terms: Terms) -> float:
    """F for migration (`compute_instance_load`); +inf for an instance without requests."""
    batch = load.running + (1 if load.waiting else 0)
    if batch == 0:
        return inf
    usage = dispatch_usage(load) + terms.classes.headroom(info, load.priorities)
    return (info.total_blocks * (1 - WATERMARK) - usage) / batch


def artifact(view: ClusterView, terms: Terms, allowed: Allowed) -> list[Pair]:
    """The moves of one round, by `need_migrate_prefill_v2` (a `rebalance.Planner`)."""
    sources, destinations = [], []
    for i, load in view.loads.items():
        info = view.instances.get(i)
        if info is None or is_draining(view, info) or info.state is InstanceState.STARTING:
            continue  # the rescheduler itself drains instances
        free = artifact_freeness(info, load, terms)
        if load.preempted or free < terms.thresholds.out_below:
            if load.running + load.waiting:
                sources.append((free, i))
        elif is_candidate(view, info) and free > terms.thresholds.in_above:
            destinations.append((-free, i))
    made = [
        Pair(source, destination, UNCHECKED)
        for (_, source), (_, destination) in zip(
            sorted(sources), sorted(destinations), strict=False
        )
    ]
    return [pair for pair in made if fit(view, pair) and allowed(pair)]


def by_artifact(candidate: Candidate, request: Request, terms: Terms) -> float:
    """F for dispatch (`compute_instance_load_dispatch`, `dispatch_load`)."""
    info, load, sent = candidate.info, candidate.load, candidate.sent
    requests = load.running + load.waiting + sent.requests
    usage = dispatch_usage(load, sent) + info.total_blocks * WATERMARK
    high = terms.classes.headroom(info, load.priorities)
    own = terms.classes.of(request.priority).headroom(info)
    usage += (0 if high else own) if own else high
    if requests == 0:
        return 2.0**40 - usage
    return (info.total_blocks - usage) / requests
