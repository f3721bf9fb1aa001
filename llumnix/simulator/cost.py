"""What a live migration costs: how long it copies, and for how long its request stands still."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class MigrationCost:
    """Seconds, as linear in the tokens of KV cache."""

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
