"""Requests that wait move together: they have no KV cache, so nothing is copied.

No record of them is kept in etcd either. A record is there for a copy that two nodes make; here
each request is handed over as it stands, and its API server gives it to the destination in a new
epoch, as it would after a failure. Whatever the former owner still does then counts nothing.
"""

import logging

from llumnix import metrics
from llumnix.cluster import ClusterView
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.migration.candidates import candidates
from llumnix.migration.errors import FailureKind, MigrationError
from llumnix.migration.messages import MovedTogether
from llumnix.policy.decision_context import Terms
from llumnix.policy.rebalance import Pair
from llumnix.policy.request_choice import leaving_together

logger = logging.getLogger(__name__)


async def move_waiting(
    hosted: HostedInstance,
    pair: Pair,
    reason: str,
    view: ClusterView,
    terms: Terms,
    count: int,
    blocks: float,
) -> MovedTogether:
    """Hand over up to `count` requests that wait and find room there. Raises MigrationError.

    Whoever has begun is none of them; nothing is awaited between the choice and the hand-over.
    """
    try:
        chosen = leaving_together(pair, candidates(hosted), view, terms, count, blocks)
    except LookupError as error:
        raise MigrationError(str(error)) from None
    if not chosen:
        sentence = f"no request of {hosted.id} would fit {pair.destination}"
        raise MigrationError(sentence, FailureKind.NO_ROOM)
    asked = {one.request: one.blocks for one in chosen}
    tenants = [t for name in asked if (t := hosted.find(name)) is not None]
    node = view.instances[pair.destination].node
    gone = await hosted.hand_over_all(tenants, pair.destination, node)
    metrics.MIGRATIONS.labels(reason, "moved", "0").inc(len(gone))
    logger.info(
        "%d requests that waited moved from %s to %s (%s)",
        *(len(gone), hosted.id, pair.destination, reason),
    )
    return MovedTogether(
        outcome="moved",
        source=hosted.id,
        destination=pair.destination,
        requests=len(gone),
        blocks=sum(asked[tenant.request_id] for tenant in gone),
    )
