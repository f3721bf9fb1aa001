"""A modelled device under vLLM's real scheduler, without weights, worker or KV cache.

    vllm serve MODEL --distributed-executor-backend llumnix.engine.sim.executor.ModelledExecutor

runs stock vLLM (frontend, engine core, scheduler, block pool, prefix cache) over it. MODEL's
configuration and tokenizer are needed, its weights are not read. The environment variable
LLUMNIX_SIM_PROFILE names the step times (`PROFILES`; default instant).

Not modelled: logprobs, structured output (the tokens know no grammar), pooling, LoRA, speculative
decoding, pipeline parallelism, asynchronous scheduling, KV connectors.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from llumnix.engine.sim.batch import Work
from llumnix.engine.sim.request import stream_seed, token_at
from llumnix.engine.vllm.kv.transfer import Job, TransferEnd
from llumnix.latency import PROFILES

PROFILE_VARIABLE = "LLUMNIX_SIM_PROFILE"
_DEFAULT_KV_BYTES = 4 << 30

# Worker methods that have nothing to do on a device without state.
_NOTHING_TO_DO = frozenset(
    {"reset_mm_cache", "reset_encoder_cache", "profile", "sleep", "wake_up", "discard"}
    | {"synchronize_device", "update_max_model_len", "llumnix_abort"}
)


@dataclass(slots=True)
class _TokenStream:
    seed: int
    prompt: int  # tokens
    avoid: frozenset[int]  # the ends of sequence, which this device never generates


@dataclass(slots=True)
class _Scheduled:
    request: str
    new: int  # tokens in this step
    computed: int  # tokens before it
    outputs: int  # of the request so far


class ModelledExecutor(Executor):
    """Answers the engine core as an executor does, from a `LatencyProfile` and token streams.

    Each request that has all its tokens computed in a step gets the token of `token_at` for its
    prompt and position, so a stream does not depend on batching, preemption or moves.
    """

    def _init_executor(self) -> None:
        name = os.environ.get(PROFILE_VARIABLE, "instant")
        if name not in PROFILES:
            raise ValueError(f"{PROFILE_VARIABLE} is {name!r}, and must be of {list(PROFILES)}")
        if self.vllm_config.kv_transfer_config is not None:
            raise ValueError("a modelled device has no KV cache for a KV connector to move")
        self._profile = PROFILES[name]
        self._vocab_size = self.model_config.get_vocab_size()
        ends = getattr(self.model_config.hf_text_config, "eos_token_id", None)
        self._ends = frozenset({ends} if isinstance(ends, int) else ends or ())
        self._streams: dict[str, _TokenStream] = {}

    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        """One full-attention layer like the others for each layer of the model."""
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size,
            num_kv_heads=self.model_config.get_num_kv_heads(self.parallel_config),
            head_size=self.model_config.get_head_size(),
            dtype=kv_cache_dtype_str_to_dtype(self.cache_config.cache_dtype, self.model_config),
        )
        layers = self.model_config.get_num_layers(self.parallel_config)
        return [{f"layers.{n}": spec for n in range(layers)}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """Vanilla ones, since nothing is laid out."""
        return [["LBHNC", "LBNHC"]]

    def set_kv_cache_layout(self, layout_name: str) -> None:
        """Nothing is laid out."""

    def determine_available_memory(self) -> list[int]:
        """Bytes: `--kv-cache-memory-bytes` (VLLM_CPU_KVCACHE_SPACE on a CPU), else 4 GiB.

        None of it is allocated; it sets the number of KV blocks, as on a real device.
        """
        return [self.cache_config.kv_cache_memory_bytes or _DEFAULT_KV_BYTES]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Nothing is allocated."""
        groups = kv_cache_configs[0].kv_cache_groups
        self._block_bytes = sum(
            len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in groups
        )

    def compile_or_warm_up_model(self) -> None:
        """There is nothing to compile."""

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """Text generation only."""
        return ("generate",)

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        """Take the time of the step, and sample for the requests that have all tokens computed."""
        output = self._step(scheduler_output)
        if not non_block:
            return output
        future = Future[ModelRunnerOutput]()
        future.set_result(output)
        return future

    def sample_tokens(
        self, grammar_output: GrammarOutput | None, non_block: bool = False
    ) -> ModelRunnerOutput:
        """Never called: `execute_model` samples at once.

        Raises:
            RuntimeError: it was called.
        """
        raise RuntimeError("the step has been sampled already")

    def execute_dummy_batch(self) -> None:
        """A step without requests takes no time."""

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> list[Any] | Future[list[Any]]:
        """What a worker without state would answer; a transfer of KV blocks ends at once.

        Raises:
            NotImplementedError: the method needs a real worker.
        """
        if method == "llumnix_reads":  # there is no memory to be read
            return [False]
        if method in ("llumnix_send", "llumnix_receive"):
            self._end_transfer(*args)
        elif method not in _NOTHING_TO_DO:
            raise NotImplementedError(f"a modelled device has no worker to ask for {method}")
        if not non_block:
            return [None]
        future = Future[list[Any]]()
        future.set_result([None])
        return future

    def check_health(self) -> None:
        """There is nothing that could fail."""

    def shutdown(self) -> None:
        """There is nothing to release."""
        self._streams.clear()

    def _end_transfer(self, blocks: list[int], job: Any) -> None:
        """Tell the node that all blocks have moved, of which there is nothing but their number."""
        job = msgspec.convert(job, Job)
        message = msgspec.msgpack.encode(
            TransferEnd(job.id, 0, len(blocks) * self._block_bytes, 0.0)
        )
        with (
            contextlib.suppress(OSError),  # the node is gone, and this process soon too
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
        ):
            channel.sendto(message, job.notify)

    def _step(self, step: SchedulerOutput) -> ModelRunnerOutput:
        for request in step.finished_req_ids:
            self._streams.pop(request, None)
        for new in step.scheduled_new_reqs:
            self._streams[new.req_id] = self._open(new)
        if not step.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        work = Work()
        requests: list[str] = []
        sampled: list[list[int]] = []
        for item in self._scheduled(step):
            work.add(item.computed, item.new)
            requests.append(item.request)
            sampled.append(self._sample(item))
        time.sleep(work.seconds(self._profile))
        index = {request: n for n, request in enumerate(requests)}
        return ModelRunnerOutput(requests, index, sampled)

    def _open(self, new: NewRequestData) -> _TokenStream:
        prompt = new.prompt_token_ids
        if prompt is None:
            raise ValueError(f"request {new.req_id} has no token ids, which the stream is made of")
        ends = self._ends
        if new.sampling_params and new.sampling_params.eos_token_id is not None:
            ends |= {new.sampling_params.eos_token_id}
        return _TokenStream(stream_seed(prompt), len(prompt), ends)

    def _scheduled(self, step: SchedulerOutput) -> Iterator[_Scheduled]:
        for new in step.scheduled_new_reqs:
            count, computed = step.num_scheduled_tokens[new.req_id], new.num_computed_tokens
            prompt = self._streams[new.req_id].prompt
            if new.prefill_token_ids is not None:
                outputs = len(new.prefill_token_ids) - prompt
            else:
                # Model runner V1 is not told of outputs that a new request brings along (a resume),
                # but a step that computes more tokens than the prompt has can only be computing
                # those. A resume prefilled in chunks that end among them needs
                # `prefill_token_ids`, which the resuming scheduler has to fill in.
                outputs = max(0, computed + count - prompt)
            yield _Scheduled(new.req_id, count, computed, outputs)
        cached = step.scheduled_cached_reqs
        for request, computed, outputs in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            yield _Scheduled(request, step.num_scheduled_tokens[request], computed, outputs)

    def _sample(self, item: _Scheduled) -> list[int]:
        stream = self._streams[item.request]
        if item.computed + item.new < stream.prompt + item.outputs:
            return []  # a chunk, and not the last one
        return [token_at(stream.seed, item.outputs, self._vocab_size, stream.avoid)]
