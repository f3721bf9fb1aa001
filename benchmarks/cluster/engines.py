"""The engines that all systems of a comparison get alike."""

import json
import os
import subprocess
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
        cache = self.kv_blocks * block_bytes(Path(self.model), self.block_size)
        if self.gpus and cache:
            # Else each engine measures what is left, while others on the same GPU start too.
            found += ["--kv-cache-memory-bytes", str(cache)]
        if self.modelled and server == "llumnix":
            found += ["--engine", "sim", "--sim-profile", self.profile]
        elif self.modelled:
            found += ["--distributed-executor-backend", _EXECUTOR]
        return [*found, *self.extra]

    def environment(self, server: str, place: int | None) -> dict[str, str]:
        """Variables of the server; with a place it is one engine, on one of the GPUs."""
        found = {}
        if self.modelled and server == "vllm":
            found["LLUMNIX_SIM_PROFILE"] = self.profile
        if self.gpus:
            used = visible()[: self.gpus]
            used = used if place is None else [used[place % len(used)]]
            found["CUDA_VISIBLE_DEVICES"] = ",".join(used)
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
    return [str(n) for n in range(len(gpu_names()))]


def gpu_names() -> list[str]:
    """The GPUs that this machine's driver knows."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in said.stdout.splitlines() if line.strip()]


def block_bytes(model: Path, block_size: int) -> int:
    """KV cache of a block, of a model of Llama's kind in its own precision; 0 if it is none."""
    try:
        config = json.loads((model / "config.json").read_text())
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        each = config.get("num_key_value_heads", heads) * width * config["num_hidden_layers"]
    except (OSError, ValueError, KeyError):
        return 0
    kind = config.get("dtype", config.get("torch_dtype"))
    return 2 * int(each) * block_size * (4 if kind == "float32" else 2)
