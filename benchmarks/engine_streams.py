"""One real vLLM engine, and streams of it as a client in the same process sees them."""

import asyncio
import itertools
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from llumnix.engine.vllm.arguments import make_parser

ON_CPU = ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
# Tokens have no content here, and nothing of a prompt is to be found in a cache.
ALWAYS = ["--no-enable-prefix-caching", "--skip-tokenizer-init"]
WORDS = (1000, 30_000)  # the tokens that prompts are made of


@dataclass(eq=False)
class Stream:
    """One request: when each of its tokens came, in seconds of the monotonic clock."""

    prompt: int  # tokens
    sent: float = field(default_factory=time.monotonic)
    times: list[float] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None

    async def reach(self, tokens: int) -> None:
        """Wait until so many have come."""
        while len(self.times) < tokens:
            if self.task is not None and self.task.done():
                self.task.result()
                raise RuntimeError(f"a stream ended with {len(self.times)} tokens, not {tokens}")
            await asyncio.sleep(0.001)

    async def end(self) -> None:
        """Drop the request, wherever it stands."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


class Engine:
    """The engine, and what it says of itself."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._numbers = itertools.count()
        self._draw = random.Random(0)

    @property
    def config(self) -> VllmConfig:
        """What vLLM made of the options."""
        return self._llm.vllm_config

    def open(self, prompt: int, outputs: int) -> Stream:
        """Send a request of so many random tokens, which ends after exactly so many outputs."""
        tokens = self._draw.choices(range(*WORDS), k=prompt)
        stream = Stream(prompt)
        stream.task = asyncio.create_task(self._read(stream, tokens, outputs))
        return stream

    async def _read(self, stream: Stream, tokens: list[int], outputs: int) -> None:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=outputs,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt, name = {"prompt_token_ids": tokens}, f"bench-{next(self._numbers)}"
        async for output in self._llm.generate(prompt, sampling, name):
            now = time.monotonic()
            stream.times += [now] * len(output.outputs[0].token_ids)

    def facts(self) -> dict[str, object]:
        """Its size and rules, as a simulated engine needs them, and what it ran on."""
        config = self.config
        scheduler = config.scheduler_config
        return {
            "vllm": _version(),
            "model": Path(config.model_config.model).name,
            "device": current_platform.get_device_name(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "eager": config.model_config.enforce_eager,
            "async_scheduling": bool(scheduler.async_scheduling),
            "chunked_prefill": bool(scheduler.enable_chunked_prefill),
            # One block is a null block, which no request gets.
            "total_blocks": int(config.cache_config.num_gpu_blocks or 0) - 1,
            "block_size": int(config.cache_config.block_size),
            "max_num_seqs": int(scheduler.max_num_seqs),
            "max_num_batched_tokens": int(scheduler.max_num_batched_tokens),
            "max_model_len": int(config.model_config.max_model_len),
        }


@asynccontextmanager
async def running(options: list[str]) -> AsyncIterator[Engine]:
    """The engine that vLLM's options ask for, up until the block ends."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    own = ON_CPU if current_platform.is_cpu() else []
    parsed = make_parser("bench").parse_args([*own, *ALWAYS, *options])
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(parsed))
    try:
        yield Engine(llm)
    finally:
        llm.shutdown()


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "vllm"
