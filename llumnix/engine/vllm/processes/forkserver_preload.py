"""What the fork server imports besides the engine core: the worker of this machine's platform."""

import importlib
import logging

from vllm.platforms import current_platform

_WORKERS = {
    "cpu": ("vllm.v1.worker.cpu_worker",),
    "cuda": ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner"),
}

for _module in _WORKERS.get(current_platform.device_type, ()):
    try:
        importlib.import_module(_module)
    except ImportError as error:
        logging.getLogger(__name__).info("not imported ahead of time: %s", error)
