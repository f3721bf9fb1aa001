"""What is compared: policies by name, over the paper's cluster of 16 times LLaMA-7B on an A10."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from llumnix.policy.decision_context import Thresholds
from llumnix.policy.priority_classes import PriorityClass
from llumnix.policy.rescheduler import PAPER
from llumnix.simulator.cluster import ClusterConfig, EngineConfig, PolicyConfig

INSTANCES = 16


@dataclass(frozen=True, slots=True)
class System:
    """One column of the tables."""

    label: str
    dispatch: str  # a key of policy.dispatch.POLICIES
    rescheduling: str  # none, or a key of plugins.PLANNERS
    request: str = "low"  # a key of policy.request_choice.RULES

    def policy(self, threshold: float, classes: tuple[PriorityClass, ...] = ()) -> PolicyConfig:
        """Its policies; one threshold for both sides, as the artifact has it."""
        return PolicyConfig(
            dispatch=self.dispatch,
            rescheduling=self.rescheduling,
            request=self.request,
            thresholds=Thresholds(threshold, threshold),
            pace=PAPER,
            classes=classes,
        )

    def cluster(self, threshold: float, instances: int = INSTANCES) -> ClusterConfig:
        """The paper's cluster under these policies."""
        return ClusterConfig(instances, EngineConfig(), self.policy(threshold))


SYSTEMS: Mapping[str, System] = MappingProxyType(
    {
        "rr": System("round-robin", "rr", "none"),
        "queue": System("queue size", "queue", "none"),
        # The artifact ran it with Llumnix's own dispatch, which counts queued demand as well.
        "infaas": System("INFaaS++", "freeness", "none"),
        "llumnix": System("Llumnix", "freeness", "llumnix"),
        "artifact": System("Llumnix-artifact", "freeness", "artifact", "LCR"),
        "ours": System("ours", "interference", "lookahead"),
    }
)
# With the two halves of ours, each beside the paper's other half, compared with Llumnix only.
EVERY: Mapping[str, System] = MappingProxyType(
    {
        **SYSTEMS,
        "dispatch": System("ours, dispatch only", "interference", "llumnix"),
        "rescheduling": System("ours, rescheduling only", "freeness", "lookahead"),
    }
)
