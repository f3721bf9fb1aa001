"""The rules of rescheduling by name; a rule is one function (`rebalance.Planner`) and one line."""

from collections.abc import Mapping
from types import MappingProxyType

from llumnix.policy.artifact import artifact
from llumnix.policy.lookahead import lookahead
from llumnix.policy.queues import queues
from llumnix.policy.rebalance import Planner, pairs

PLANNERS: Mapping[str, Planner] = MappingProxyType(
    {
        "llumnix": pairs,
        "artifact": artifact,
        "lookahead": lookahead,
        "queues": queues,
    }
)
