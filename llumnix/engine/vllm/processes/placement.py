"""Which share of the machine each instance of a node gets: CPU cores, or GPUs."""

import os
from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from llumnix.engine.vllm.processes.launcher import Placement


def place(config: VllmConfig, slot: int, instances: int) -> Placement:
    """The placement of the instance in `slot` when `instances` are planned on this node.

    More instances than there are shares begin again with the first share: they have to fit
    beside each other, for which vLLM's --gpu-memory-utilization is the option.
    """
    if current_platform.is_cpu():
        return _on_cores(config, slot, instances)
    workers = config.parallel_config.world_size
    devices = _visible_devices(current_platform.device_control_env_var, workers)
    start = slot * workers % max(len(devices) - len(devices) % workers, workers)
    share = devices[start : start + workers]
    return Placement({current_platform.device_control_env_var: ",".join(share)})


def _on_cores(config: VllmConfig, slot: int, instances: int) -> Placement:
    """An equal share of the cores; one core stays free for the node if there are enough."""
    if os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") != "auto":
        return Placement()  # the operator has bound them
    cores = sorted(os.sched_getaffinity(0))
    share = cut(cores, slot, max(instances, 1))
    # vLLM wants a list of cores for each worker; its workers share what the instance has.
    workers = config.parallel_config.world_size
    parts = [cut(share, worker, workers) for worker in range(workers)]
    text = "|".join(",".join(str(core) for core in part) for part in parts)
    return Placement({"VLLM_CPU_OMP_THREADS_BIND": text}, frozenset(share))


def cut(cores: Sequence[int], index: int, parts: int) -> list[int]:
    """The part at `index` of the cores cut into equal parts, one core at least."""
    spare = 1 if len(cores) > parts else 0
    size = max((len(cores) - spare) // parts, 1)
    start = index * size % max(len(cores) - spare - size + 1, 1) if size > 1 else index
    return [cores[(start + n) % len(cores)] for n in range(size)]


def _visible_devices(variable: str, workers: int) -> list[str]:
    """The devices that this node may use, as the environment or the platform says."""
    if chosen := os.environ.get(variable):
        return chosen.split(",")
    return [str(n) for n in range(max(current_platform.device_count(), workers))]
