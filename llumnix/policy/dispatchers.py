"""The dispatch policies by name; a policy is one function (`dispatch.Score`) and one line."""

from collections.abc import Mapping
from types import MappingProxyType

from llumnix.policy.artifact import by_artifact
from llumnix.policy.dispatch import (
    Policy,
    by_chance,
    by_count,
    by_freeness,
    by_load,
    by_memory,
    by_queue,
    by_turn,
)
from llumnix.policy.interference import by_interference
from llumnix.policy.slo import by_slo

POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "load": Policy(by_load, keeps=True),
        "freeness": Policy(by_freeness, keeps=True),
        "memory": Policy(by_memory, keeps=True),
        "queue": Policy(by_queue, keeps=True),
        "balanced": Policy(by_count, keeps=True),
        "rr": Policy(by_turn, keeps=True),
        "random": Policy(by_chance, keeps=True),
        "slo": Policy(by_slo),
        "interference": Policy(by_interference),
        "artifact": Policy(by_artifact, keeps=True),
    }
)
