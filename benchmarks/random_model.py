"""Models with random weights, for machines that no checkpoint can be brought to.

    python benchmarks/random_model.py FOLDER [--shape small|llama-3b|llama-7b]

`small` gets weights that make each of its tokens hang on all tokens before: one wrong KV block
changes what follows. The others are configurations alone, for `--load-format dummy`: they serve for
speed. None has a tokenizer, so engines want `--skip-tokenizer-init`.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Wide enough that attention singles out tokens (query times key has a deviation of about 3).
SPREAD = 0.08

SHAPES = {
    "small": LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
    ),
    "llama-3b": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        max_position_embeddings=4096,
    ),
    "llama-7b": LlamaConfig(max_position_embeddings=4096),  # transformers' own defaults
}


def make(folder: Path, shape: str, seed: int = 0) -> None:
    """Write the model of that shape into a folder, the same one for each seed."""
    config = SHAPES[shape]
    config.architectures = ["LlamaForCausalLM"]
    if shape == "small":
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)


def main() -> None:
    """Make one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    args = parser.parse_args()
    make(args.folder, args.shape)
    print(f"{args.shape}: {args.folder}")


if __name__ == "__main__":
    main()
