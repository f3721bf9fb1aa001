"""The modelled device under vLLM's real scheduler, and the modelled engine against both.

vLLM runs in a process of its own (this file as a script), since it sets up much that cannot be
undone; importing it is most of the time this takes.
"""

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest

from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.model import ModelledEngine
from llumnix.engine.sim.request import SimRequest

Policy = Literal["fcfs", "priority"]
POLICIES: tuple[Policy, ...] = ("fcfs", "priority")
BLOCKS, VOCABULARY = 40, 1000
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def test_the_model_schedules_as_vllm_does(tmp_path: Path) -> None:
    """Same outputs, batch, queue and blocks after every step, under constant preemption.

    That the streams are right under preemption is proved of the model elsewhere, so it holds for
    the executor too.
    """
    pytest.importorskip("vllm.v1.executor.abstract")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # vLLM logs to the same stdout
    compared = [line.split() for line in done.stdout.splitlines() if line.startswith("compared ")]
    assert [line[1] for line in compared] == list(POLICIES)
    assert all(int(steps) > 500 and int(preemptions) > 10 for *_, steps, preemptions in compared)


def _vllm_engine(model: str, policy: Policy) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        distributed_executor_backend="llumnix.engine.sim.executor.ModelledExecutor",
        block_size=32,
        max_model_len=512,
        max_num_batched_tokens=200,
        max_num_seqs=12,
        num_gpu_blocks_override=BLOCKS + 1,  # one is vLLM's null block
        enable_prefix_caching=False,
        scheduling_policy=policy,
    )
    return LLMEngine.from_engine_args(args)


def _model(policy: Policy) -> ModelledEngine:
    return ModelledEngine(
        ModelConfig(
            total_blocks=BLOCKS,
            block_size=32,
            max_model_len=512,
            max_num_batched_tokens=200,
            max_num_seqs=12,
            vocab_size=VOCABULARY,
            priority=policy == "priority",
        )
    )


def _compare(model: str, policy: Policy) -> None:
    from vllm import SamplingParams

    real, sim, rng = _vllm_engine(model, policy), _model(policy), Random(5)
    scheduler = real.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    arrivals = sorted(rng.randrange(150) for _ in range(40))
    streams: dict[str, int] = {}
    step = 0
    while arrivals or sim.has_work:
        while arrivals and arrivals[0] <= step:
            arrivals.pop(0)
            name = str(len(streams))
            streams[name] = 0
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 300))]
            outputs, priority = rng.randrange(1, 200), rng.randrange(-1, 2)
            params = SamplingParams(max_tokens=outputs, temperature=0, detokenize=False)
            real.add_request(
                name, {"prompt_token_ids": prompt}, params, len(streams), priority=priority
            )
            sim.add(SimRequest(name, prompt, outputs, priority=priority))
        theirs = {}
        for output in real.step():
            tokens = output.outputs[0].token_ids
            theirs[output.request_id] = tuple(tokens[streams[output.request_id] :])
            streams[output.request_id] = len(tokens)
        ours = {output.request: output.tokens for output in sim.step().outputs}
        sim.check()
        assert ours == theirs, f"step {step}"
        used = BLOCKS - pool.get_num_free_blocks()
        assert (sim.running, sim.waiting, sim.used_blocks) == (
            len(scheduler.running),
            len(scheduler.waiting),
            used,
        ), f"step {step}"
        step += 1
    print("compared", policy, step, sim.preemptions)


if __name__ == "__main__":
    import os

    # Both must be set before vLLM is imported: the scheduler is looked at in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    for each in POLICIES:
        _compare(sys.argv[1], each)
