"""The knobs of a node's connections: how many, and how long each may take for what."""

import math
from dataclasses import dataclass

from llumnix.knob import ConfigError, knob


@dataclass(frozen=True, kw_only=True)
class ConnectionConfig:
    """What clients may take of a node's connections."""

    max_connections: int = knob(
        0,
        "connections open at this node; beyond them those without a request give way, and then new "
        "ones get 503, but probes and nodes have places of their own; 0: what descriptors allow",
    )
    header_timeout: float = knob(
        10.0, "seconds within which the head of a request must be there, from its first byte"
    )
    body_timeout: float = knob(60.0, "seconds within which the body of a request must be there")
    idle_timeout: float = knob(
        0.0,
        "seconds after which a connection without a request is closed; 0: as "
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE says, and 75 without it, longer than proxies keep theirs",
    )
    body_budget: int = knob(
        512 * 2**20,
        "bytes of all request bodies that are being read or answered at a time, not counting the "
        "first 64 KiB of each; beyond them: 429; 0: no limit",
    )

    def check_connections(self) -> None:
        """Raise ConfigError for the first of these knobs whose value cannot work."""
        for name in ("header_timeout", "body_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be more than 0 seconds")
        if not 0 <= self.idle_timeout < math.inf:
            raise ConfigError("--idle-timeout must be a number of seconds, and not negative")
        for name in ("max_connections", "body_budget"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} must not be negative")
