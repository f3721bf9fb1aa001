"""What is simulated: the instances, their engines, the policies over them, what a move costs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from types import MappingProxyType

from llumnix.engine.sim.config import ModelConfig
from llumnix.latency import PROFILES, LatencyProfile
from llumnix.plugins import dispatch_policy, planner
from llumnix.policy.decision_context import Terms, Thresholds
from llumnix.policy.priority_classes import Classes, PriorityClass
from llumnix.policy.request_choice import RULES
from llumnix.policy.rescheduler import Pace
from llumnix.policy.scaling import ScalingTerms


@dataclass(frozen=True, slots=True)
class MigrationCost:
    """What a live migration costs: seconds, as linear in the tokens of KV cache."""

    copy_fixed: float = 0.0
    copy_token: float = 0.0
    downtime_fixed: float = 0.0
    downtime_token: float = 0.0
    slowdown: float = 0.0  # by which share the steps of both engines are longer meanwhile
    message: float = 0.0  # for a request that waits and has no KV cache: one way over the network

    def copy(self, tokens: int) -> float:
        """Seconds that so many tokens travel while the request goes on."""
        return self.copy_fixed + self.copy_token * tokens

    def downtime(self, tokens: int) -> float:
        """Seconds between the last step at the source and the first at the destination."""
        return self.downtime_fixed + self.downtime_token * tokens


COSTS: Mapping[str, MigrationCost] = MappingProxyType(
    {
        "free": MigrationCost(),
        # LLaMA-7B between A10s, Gloo over 64 Gb/s: Fig. 10 of the paper. Blocking copy 68 to 1,682
        # ms and downtime 13 to 26 ms for 256 to 8,192 tokens; steps 1.6 to 3.1 % longer.
        "llama-7b-a10": MigrationCost(15.2e-3, 0.211e-3, 12e-3, 1.7e-6, 0.025, 1e-3),
        # LLaMA-7B shape, two engines on one H100, NCCL over loopback sockets (docs/migration.md):
        # a blocking copy takes 103 to 580 ms for 256 to 2,048 tokens. The gap of 20 ms at every
        # length is half a step at the destination, its next step with the tail of the request in
        # it (7 ms, which the engine models), and this downtime; the source's steps are 5 % longer.
        "llama-7b-h100": MigrationCost(35e-3, 0.266e-3, 9e-3, 0.0, 0.05, 1e-3),
        # LLaMA-7B shape between two H200s, read in place over NVLink (docs/gpu.md): a move of 256
        # to 7,000 tokens takes 44 to 66 ms, and the gap of 9.0 to 13.5 ms is this downtime and one
        # step of the destination (4.5 to 5.5 ms, which the engine models).
        "llama-7b-h200x2": MigrationCost(43e-3, 3.3e-6, 4.4e-3, 0.5e-6, 0.022, 1e-3),
    }
)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One instance; the defaults are LLaMA-7B on an A10 as the paper ran it (Llumnix, OSDI'24).

    The names are those of `ModelConfig`.
    """

    profile: str | LatencyProfile = "llama-7b-a10"  # a key of latency.PROFILES, or coefficients
    total_blocks: int = 792  # the artifact: with so many tokens batched, 12,672 tokens are left
    block_size: int = 16  # tokens in a KV block
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 12_800  # a step
    max_model_len: int = 12_300  # prompt and outputs, tokens
    priority: bool = False  # the queue is ordered by priority, then arrival
    prefill_first: bool = True  # vLLM 0.1's rule; else chunked prefill, as vLLM has it today
    async_scheduling: bool = False  # a step is made up when the one before it begins
    watermark: float = 0.01  # share of the KV blocks that an admission leaves free

    @property
    def latency(self) -> LatencyProfile:
        """How long its steps take. Raises ValueError with one sentence."""
        if isinstance(self.profile, LatencyProfile):
            return self.profile
        if self.profile not in PROFILES:
            raise ValueError(f"no profile {self.profile!r}; there are {', '.join(PROFILES)}")
        return PROFILES[self.profile]

    def model(self) -> ModelConfig:
        """The modelled engine's own configuration. Raises ValueError with one sentence."""
        return ModelConfig(**(asdict(self) | {"profile": self.latency}), silent=True)


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Who decides, and how often."""

    dispatch: str = "load"  # a name that plugins.dispatch_policy knows
    top_k: int = 1
    dispatchers: int = 1  # API servers that dispatch in turn, each knowing its own requests only
    rescheduling: str = "none"  # a name that plugins.planner knows
    request: str = "low"  # which request leaves, a key of policy.request_choice.RULES
    interval: float = 0.2  # seconds between two rounds of rescheduling
    report_interval: float = 0.2  # seconds between two reports of load
    pace: Pace = field(default_factory=Pace)  # how much is moved at once
    thresholds: Thresholds = field(default_factory=Thresholds)
    classes: tuple[PriorityClass, ...] = ()

    def __post_init__(self) -> None:
        dispatch_policy(self.dispatch)
        planner(self.rescheduling)
        if self.request not in RULES:
            raise ValueError(f"no rule {self.request!r}; there are {', '.join(RULES)}")
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, and must be 1 or more")
        if len({c.priority for c in self.classes}) < len(self.classes):
            raise ValueError("two classes have the same priority")
        if not (self.interval > 0 and self.report_interval > 0 and self.dispatchers > 0):
            raise ValueError("intervals and the number of dispatchers are more than 0")

    def terms(self, latency: LatencyProfile) -> Terms:
        """The operator's side of all decisions."""
        classes = Classes({c.priority: c for c in self.classes})
        return Terms(self.thresholds, classes, latency)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything about the cluster; what comes in is the workload's."""

    instances: int = 16
    engine: EngineConfig = field(default_factory=EngineConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    migration: str = "llama-7b-a10"  # what a move costs, a key of COSTS
    scaling: ScalingTerms | None = None  # None: the number of instances stays
    scaling_interval: float = 1.0  # seconds between two looks of the scaler
    start_seconds: float = 0.0  # that an instance takes until it is ready, if it is added later
    sample_interval: float = 1.0  # seconds
    longest: float = inf  # seconds of virtual time after which the run is cut off

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise ValueError("a cluster has at least one instance")
        if self.scaling is not None and self.instances > self.scaling.maximum:
            raise ValueError(
                f"the cluster begins with {self.instances} instances, but scales up to "
                f"{self.scaling.maximum} at most"
            )
        if not (self.sample_interval > 0 and self.scaling_interval > 0 and self.start_seconds >= 0):
            raise ValueError("intervals are more than 0 seconds, and a start takes 0 or more")
        if self.migration not in COSTS:
            raise ValueError(f"no migration cost {self.migration!r}: {', '.join(COSTS)}")
        self.engine.model()
