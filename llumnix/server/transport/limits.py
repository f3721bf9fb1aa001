"""How many connections this process may have, by its options and its descriptors, and how long."""

import os
import resource

from vllm import envs

from llumnix.config import Config
from llumnix.option_fields import ConfigError
from llumnix.server.transport.connection_places import Limits

WANTED = 65_535  # descriptors, as vLLM's server asks for
OWN = 512  # for engines, nodes, etcd and files; with few descriptors, half of them
MOST = 16_384  # connections, unless more are asked for
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


def places(asked: int, reserve: int) -> int:
    """The limit of connections: what is asked for, or with 0, what descriptors allow.

    Raises the process's soft limit of descriptors first. Raises ConfigError if there are not enough
    of them.
    """
    room = _descriptors() - reserve
    room -= min(OWN, room // 2)
    if asked > room:
        raise ConfigError(
            f"--max-connections is {asked}, but this process may open only {room} (see ulimit -n)"
        )
    return asked or max(1, min(room, MOST))


def _descriptors() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    best = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft == resource.RLIM_INFINITY or soft >= best:
        return soft if soft != resource.RLIM_INFINITY else WANTED
    resource.setrlimit(resource.RLIMIT_NOFILE, (best, hard))
    return best
