"""How many connections a process has descriptors for."""

import resource

from llumnix.knob import ConfigError

WANTED = 65_535  # descriptors, as vLLM's server asks for
OWN = 512  # for engines, nodes, etcd and files; with few descriptors, half of them
MOST = 16_384  # connections, unless more are asked for


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
