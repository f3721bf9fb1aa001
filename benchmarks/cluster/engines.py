"""The engines that all systems of a comparison get alike."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_EXECUTOR = "llumnix.engine.sim.executor.ModelledExecutor"
_USED = 0.88  # of a GPU's memory, by all instances on it together


@dataclass(frozen=True)
class Engines:
    """How many there are, of what, and where."""

    model: str
    served: str = "m"
    instances: int = 2
    gpus: int = 0  # 0: on the CPU
    modelled: bool = False  # vLLM's scheduler over modelled devices
    profile: str = "cpu-smoke"  # of these
    load_format: str = "auto"
    max_model_len: int = 4096
    kv_blocks: int = 0  # 0: as many as there is memory for
    block_size: int = 16
    memory: float | None = None  # share of a GPU for an instance; default: an equal one
    extra: Sequence[str] = ()  # options of vLLM

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its output together that an instance can take."""
        if not self.kv_blocks:
            return self.max_model_len
        return min(self.max_model_len, (self.kv_blocks - 1) * self.block_size)

    def arguments(self, server: str) -> list[str]:
        """Options of the server, vllm's or llumnix's."""
        found = ["--served-model-name", self.served, "--max-model-len", str(self.max_model_len)]
        found += ["--disable-uvicorn-access-log", "--block-size", str(self.block_size)]
        if self.load_format != "auto":
            found += ["--load-format", self.load_format]
        if self.kv_blocks:
            found += ["--num-gpu-blocks-override", str(self.kv_blocks)]
        if self.gpus:
            found += ["--gpu-memory-utilization", f"{self.share():.2f}"]
        if self.modelled and server == "llumnix":
            found += ["--engine", "sim", "--sim-profile", self.profile]
        elif self.modelled:
            found += ["--distributed-executor-backend", _EXECUTOR]
        return [*found, *self.extra]

    def environment(self, server: str, place: int | None) -> dict[str, str]:
        """Variables of the server; with a place it is one engine, on one GPU."""
        found = {}
        if self.modelled and server == "vllm":
            found["LLUMNIX_SIM_PROFILE"] = self.profile
        if self.gpus and place is not None:
            found["CUDA_VISIBLE_DEVICES"] = visible()[place % self.gpus]
        return found

    def share(self) -> float:
        """Share of a GPU's memory for each instance."""
        if self.memory is not None:
            return self.memory
        each = -(-self.instances // self.gpus)
        return int(_USED / each * 100) / 100


def visible() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    devices = [p.name for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    return [str(n) for n in range(len(devices))]
