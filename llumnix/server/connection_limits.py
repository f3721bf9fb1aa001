"""How the knobs of connections become the limits of this process."""

import os

from vllm import envs

from llumnix.config import Config
from llumnix.server.connection_places import Limits
from llumnix.server.file_descriptors import places

RESERVE = 64  # places for probes, operators and nodes
IDLE = 75.0  # seconds, if nobody says how many: proxies close theirs after 60, and should be first


def connection_limits(config: Config) -> Limits:
    """The limits of the connections of this process.

    Raises ConfigError if it cannot have as many as are asked for.
    """
    idle = config.idle_timeout
    if not idle:
        name = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
        idle = float(envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE) if os.environ.get(name) else IDLE
    return Limits(
        connections=places(config.max_connections, RESERVE),
        reserve=RESERVE,
        header_timeout=config.header_timeout,
        idle_timeout=max(idle, 1.0),
        send_timeout=config.send_timeout,
    )
