"""What a maintainer runs on a machine with GPUs before a release: do moves work, and are they fast?

    python benchmarks/gpu_check.py [--out FOLDER]      (make gpu-check)

Two engines move requests by every way that this machine has: on one GPU, between two, by NCCL, with
tensor parallelism 2. Each check has a bound; the exit status is 1 if one of them is missed. The
table goes to FOLDER/gpu-check.md, all figures to a JSON file of each check beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

from benchmarks.cluster.engines import visible

HERE = Path(__file__).parent
SECONDS = 300.0  # for a check, of which an engine's start is most
EXACT = {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"}  # float32 that is float32
BIG = ("--load-format", "dummy", "--kv-cache-memory-bytes", "20G", "--max-model-len", "4096")
FAST = (*BIG, "--rounds", "3", "--cycles", "20", "--contexts", "256", "1024", "3000")
SMALL = ("--dtype", "float32", "--max-model-len", "4096", "--gpu-memory-utilization", "0.3")
SAME = (*SMALL, "--rounds", "0", "--cycles", "0", "--identity", "8", "--contexts", "600")
MOST_STEPS = {"memory": 2.5, "group": 4.0}  # decode steps that a moved stream may stand still
MOST_SLOWER = 0.05  # share by which the steps of others may be longer meanwhile


@dataclass(frozen=True)
class Check:
    """One run of benchmarks/migration.py, and what its figures have to be."""

    name: str
    gpus: int
    model: str  # a shape of random_model.py
    arguments: tuple[str, ...]
    judge: Callable[[dict[str, Any]], list[str]]  # sentences about what is wrong


def fast(found: dict[str, Any], most: float) -> list[str]:
    """What is too slow."""
    wrong = []
    for row in found["gaps"]:
        steps = row["gap"] / row["step"]
        if row["how"] == "live" and steps > most:
            wrong.append(f"a gap of {steps:.1f} steps at {row['context']} tokens, over {most}")
    for role, share in found["slow_down"]["slow_down"].items():
        if share > MOST_SLOWER:
            wrong.append(f"steps at the {role} are {share:.1%} longer, over {MOST_SLOWER:.0%}")
    return wrong


def same(found: dict[str, Any]) -> list[str]:
    """Which tokens differ."""
    tokens = found["identity"]
    if tokens["moved"] == tokens["requests"]:
        return []
    return [f"{tokens['moved']} of {tokens['requests']} requests gave the same tokens"]


CHECKS = (
    Check("one GPU, memory", 1, "llama-7b", (*FAST, "--gpu-memory-utilization", "0.4"),
          lambda found: fast(found, 4.0)),
    Check("two GPUs, memory", 2, "llama-7b", (*FAST, "--gpu-memory-utilization", "0.5"),
          lambda found: fast(found, MOST_STEPS["memory"])),
    Check("two GPUs, NCCL", 2, "llama-7b",
          (*FAST, "--gpu-memory-utilization", "0.5", "--carrier", "group"),
          lambda found: fast(found, MOST_STEPS["group"])),
    Check("two GPUs, the same tokens", 2, "small", SAME, same),
    Check("tensor parallelism 2, the same tokens", 2, "small",
          (*SAME, "--tensor-parallel-size", "2"), same),
)  # fmt: skip


def carry_out(check: Check, models: Path, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Its figures, and what is wrong."""
    model = models / check.model
    if not model.exists():
        make = [sys.executable, str(HERE / "random_model.py"), str(model), "--shape", check.model]
        subprocess.run(make, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    file = out / f"gpu-check-{check.name.replace(' ', '-').replace(',', '')}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "migration.py"), "--model", str(model), "--json"]
    command += [str(file), "--skip-tokenizer-init", *check.arguments]
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(visible()[: check.gpus])}
    try:
        done = subprocess.run(
            command,
            env=os.environ | seen | (EXACT if check.judge is same else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {}, [f"not done within {SECONDS:.0f} s"]
    if done.returncode or not file.exists():
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "")
        return {}, [f"it failed: {last[-200:]}"]
    found = json.loads(file.read_text())
    return found, check.judge(found)


def told(found: dict[str, Any]) -> str:
    """The figures in one cell."""
    parts = []
    for row in found.get("gaps", ()):
        if row["how"] == "live":
            gap = f"{row['gap'] * 1e3:.1f} ms ({row['gap'] / row['step']:.1f} steps)"
            parts.append(f"{row['context']} tokens: {gap}, move {row['seconds'] * 1e3:.0f} ms")
    if slow := found.get("slow_down"):
        parts.append("others " + ", ".join(f"{v:+.1%}" for v in slow["slow_down"].values()))
    if tokens := found.get("identity"):
        parts.append(f"{tokens['moved']} of {tokens['requests']} alike")
    return "; ".join(parts) or "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out all checks that this machine has GPUs for; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"))
    out = parser.parse_args(argv).out
    gpus = len(visible())
    if not gpus:
        print("there is no GPU here: run it on a machine with one or two", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    lines, failed = ["| check | result | figures |", "|---|---|---|"], False
    with tempfile.TemporaryDirectory() as models:
        for check in tqdm(CHECKS, desc="checks", disable=None):
            if check.gpus > gpus:
                lines.append(f"| {check.name} | needs {check.gpus} GPUs | - |")
                continue
            found, wrong = carry_out(check, Path(models), out)
            failed |= bool(wrong)
            lines.append(f"| {check.name} | {'; '.join(wrong) or 'passed'} | {told(found)} |")
    table = "\n".join(lines)
    (out / "gpu-check.md").write_text(table + "\n")
    print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
