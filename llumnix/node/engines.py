"""Which engine a node runs: vLLM, or the modelled one; both from vLLM's own arguments."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from llumnix.cluster import InstanceId
from llumnix.config import Config, ConfigError
from llumnix.engine.base import Engine
from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.instance import SimEngine
from llumnix.engine.vllm import scheduler
from llumnix.engine.vllm.instance import VllmEngine
from llumnix.engine.vllm.kv.carrier import LADDER
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from llumnix.engine.vllm.processes.placement import place
from llumnix.engine.vllm.processes.watchdog import Machine, Patience
from llumnix.latency import PROFILES

MakeEngine = Callable[[InstanceId, int], Engine]

SIM_BLOCKS = 4096  # KV blocks of a modelled engine, unless --num-gpu-blocks-override says


def engine_maker(
    config: Config,
    vllm_config: VllmConfig,
    rendezvous: Callable[[], Rendezvous] = lambda: Rendezvous("", {}, ""),
) -> MakeEngine:
    """The function that makes the engine of an instance in a slot of this node.

    `rendezvous` tells where the workers of two instances meet. Raises ConfigError if the modelled
    engine cannot be what is asked for.
    """
    if config.engine == "sim":
        model = model_config(config, vllm_config)
        return lambda instance, slot: SimEngine(instance, model)

    logs = Path(config.state_dir) / "logs"
    machine = Machine()
    patience = Patience(config.start_timeout, config.hang_timeout, config.step_timeout)

    def make(instance: InstanceId, slot: int) -> Engine:
        placement = place(vllm_config, slot, config.initial_instances)
        log_file = logs / f"{instance}.log"
        meet = replace(rendezvous(), ladder=ladder(config.migration_carrier))
        return VllmEngine(instance, vllm_config, placement, log_file, patience, meet, machine)

    return make


def ladder(carrier: str) -> tuple[str, ...]:
    """The ways for KV blocks that `--migration-carrier` allows, the best first."""
    if carrier == "auto":
        carrier = "group" if current_platform.is_cpu() else "memory"
    return LADDER[LADDER.index(carrier) :]


def resumes(config: Config, vllm_config: VllmConfig) -> bool:
    """Whether a request that has begun can go on at another of these engines."""
    return config.engine == "sim" or scheduler.installed(vllm_config)


def model_config(config: Config, vllm_config: VllmConfig) -> ModelConfig:
    """The modelled engine with the limits of vLLM's configuration. Raises ConfigError."""
    if config.sim_profile not in PROFILES:
        names = ", ".join(PROFILES)
        raise ConfigError(f"--sim-profile {config.sim_profile} is not one of {names}")
    cache, scheduling = vllm_config.cache_config, vllm_config.scheduler_config
    try:
        return ModelConfig(
            total_blocks=cache.num_gpu_blocks_override or SIM_BLOCKS,
            block_size=cache.block_size or 16,
            max_num_seqs=scheduling.max_num_seqs,
            max_num_batched_tokens=scheduling.max_num_batched_tokens,
            max_model_len=vllm_config.model_config.max_model_len,
            vocab_size=vllm_config.model_config.get_vocab_size(),
            priority=scheduling.policy == "priority",
            profile=PROFILES[config.sim_profile],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
