"""How the waits of a node relate to the time that its lease lives."""

import logging

logger = logging.getLogger(__name__)


def interval_of(ttl: float) -> float:
    """Seconds between two keep-alives of a lease that lives `ttl` seconds."""
    return ttl / 3


def fitting_timeout(ttl: float, timeout: float) -> float:
    """The seconds that a call may wait for a member: `timeout`, or less where that is too long.

    A keep-alive must be able to fail at one member and succeed at the next before the lease ends:
    interval + 2 * timeout <= ttl.
    """
    longest = (ttl - interval_of(ttl)) / 2
    if timeout <= longest:
        return timeout
    logger.warning(
        "An etcd timeout of %.2f s is too long for a lease of %.1f s, as a keep-alive every "
        "%.1f s must be able to fail once, so it is %.2f s.",
        timeout,
        ttl,
        interval_of(ttl),
        longest,
    )
    return longest
