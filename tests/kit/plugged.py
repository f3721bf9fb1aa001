"""What operators plug into an engine: a logits processor, and a LoRA adapter made for a test."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class EveryThird(AdapterLogitsProcessor):
    """With `third` in its extra_args, each third output of a request is that token."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        third = (params.extra_args or {}).get("third")
        if third is None:
            return None

        def process(outputs: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(outputs) % 3 == 2:
                logits[third] += 1e4
            return logits

        return process


def make_adapter(model: str, folder: Path, rank: int = 4) -> str:
    """A LoRA adapter with random weights, large enough to change what the model says."""
    config = json.loads((Path(model) / "config.json").read_text())
    hidden, generator = config["hidden_size"], torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        for part, shape in (("lora_A", (rank, hidden)), ("lora_B", (hidden, rank))):
            weights[f"{name}.{part}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    told |= {"bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": model}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return str(folder)
