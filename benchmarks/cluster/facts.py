"""What a result has to say of how it came about."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.cluster.engines import Engines, gpu_names


def facts(engines: Engines, argv: list[str]) -> dict[str, Any]:
    """Versions, device and the command."""
    return {
        "format": 1,
        "command": "python -m benchmarks.cluster " + " ".join(argv),
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: _version(name) for name in ("llumnix", "vllm", "torch", "vllm-router")},
        "python": platform.python_version(),
        "device": device(engines),
        "cores": os.cpu_count(),
        "cluster": describe(engines),
    }


def describe(engines: Engines) -> str:
    """The cluster in one line: what is compared must have the same."""
    many = "1 instance" if engines.instances == 1 else f"{engines.instances} instances"
    parts = [f"{many} of {Path(engines.model).name} on {device(engines)}"]
    if engines.kv_blocks:
        parts.append(f"{engines.kv_blocks} KV blocks of {engines.block_size} tokens each")
    parts.append(f"at most {engines.longest} tokens a request")
    return ", ".join([*parts, *([" ".join(engines.extra)] if engines.extra else [])])


def device(engines: Engines) -> str:
    """What the engines run on."""
    if engines.modelled:
        return f"a modelled device ({engines.profile})"
    if not engines.gpus:
        return "the CPU"
    return f"{engines.gpus} x {(gpu_names() or ['GPU'])[0]}"


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
