"""What PyTorch compiles while an engine serves: where it is kept, and that nobody waits for it.

A few of vLLM's functions, such as the one that ranks logprobs, are compiled when a request needs
them for the first time. That takes a C++ compiler 10 to 25 s, for which the whole engine stands;
where it fails, the engine dies of an ordinary request, and the next one that is asked with it.
"""

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llumnix.engine.vllm.processes.socket_folder import scratch
from llumnix.private_folders import is_private

if TYPE_CHECKING:  # vLLM's import takes seconds, and begins after the fork server has begun with it
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


def place() -> None:
    """Keep compiled code where nobody else can have put any: beside vLLM's own.

    PyTorch's default is a name in the temporary folder that anybody can guess and make, and what
    lies there it loads and runs. The import of vLLM fixes the place, so this comes before it.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = os.environ.get("VLLM_CACHE_ROOT") or Path(cache, "vllm")  # as vllm.envs says
    folder = Path(root, "torchinductor")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not is_private(folder, others_may=0o055):
        folder = scratch() / "torchinductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compile_nothing_if_eager(config: "VllmConfig") -> None:
    """Have `--enforce-eager` mean it, on CPUs, in this process and those that are forked from it.

    On GPUs some attention backends are nothing without their compiled kernels.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and config.model_config.enforce_eager:
        import torch

        torch.compiler.set_stance("force_eager")


def compile_ahead(core: Any) -> None:
    """An engine core's utility: its workers compile now what else a client's request would.

    What fails is left uncompiled, which is slower and works.
    """
    with contextlib.suppress(NotImplementedError):  # a modelled device has no workers
        core.model_executor.collective_rpc(_compile)


def _compile(worker: Any) -> None:
    import torch
    from vllm.v1.sample.sampler import Sampler

    vocabulary = worker.model_config.get_vocab_size()
    try:
        with torch.inference_mode():
            logprobs = torch.zeros(2, vocabulary, device=worker.device)
            tokens = torch.zeros(2, dtype=torch.int64, device=worker.device)
            Sampler.gather_logprobs(logprobs, 1, tokens)
    except Exception:  # no compiler, no room for its files, or a version that has it elsewhere
        logger.exception("the ranks of logprobs can't be compiled, and are computed without")
        torch._dynamo.config.suppress_errors = True
    if worker.device.type == "cuda":
        _compile_block_copy(worker.device)


def _compile_block_copy(device: Any) -> None:
    """The kernel that reads another instance's KV blocks, which takes 0.4 s at its first use."""
    import torch

    try:
        from llumnix.engine.vllm.kv.block_copy import WORD, BlockCopy

        words = torch.zeros(2, dtype=torch.int64, device=device)
        first, second = words.data_ptr(), words.data_ptr() + WORD
        BlockCopy([(first, WORD, WORD)], [(second, WORD, WORD)], device)([0], [0])
        torch.cuda.synchronize(device)
    except Exception:  # the first two instances that meet find out, and take another way
        logger.exception("the kernel that copies KV blocks can't be compiled")
