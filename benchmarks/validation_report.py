"""Prints and draws what `validation.py` has compared.

python benchmarks/validation_report.py FILE [--plot PNG]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

NUMBERS = ("mean", "p50", "p99")
QUANTITIES = {"ttft": "time to first token (ms)", "tpot": "time per further token (ms)"}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """One line for each rate and quantity, as Markdown."""
    lines = ["| requests/s | | real mean | simulated | error | real P99 | simulated | error |"]
    lines.append("|---" * 8 + "|")
    for run in runs:
        for quantity in QUANTITIES:
            cells = [f"{run['rate']:.2f}", quantity.upper()]
            for number in ("mean", "p99"):
                real, ours = (run[who][quantity][number] for who in ("real", "simulated"))
                cells += [f"{real * 1e3:.1f} ms", f"{ours * 1e3:.1f} ms"]
                cells.append(f"{run['errors'][quantity][number]:+.1%}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def beside(result: dict[str, Any]) -> str:
    """What the machine did beside, at each rate."""
    lines = [f"measuring: others kept {result['cores_of_others']:.2f} cores busy"]
    for run in result["runs"]:
        lines.append(
            f"{run['rate']:.2f}/s: others kept {run['cores_of_others']:.2f} cores busy; "
            f"a decode step then took {run['drift']:.2f} times its first"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], file: Path) -> None:
    """The distributions of both quantities, real and simulated, at each rate."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, (quantity, label) in zip(both, QUANTITIES.items(), strict=True):
        for place, run in enumerate(result["runs"]):
            for who, style in (("real", "-"), ("simulated", "--")):
                column = run["columns"].index(f"{who}_{quantity}")
                values = np.sort([row[column] for row in run["requests"] if row[column] > 0]) * 1e3
                shares = np.arange(1, len(values) + 1) / len(values)
                name = f"{run['rate']:.2f}/s, {who}"
                axes.step(values, shares, style, color=f"C{place}", label=name)
        axes.set(xlabel=label, ylabel="requests", xscale="log", ylim=(0, 1))
        axes.grid(alpha=0.3)
    both[0].legend(fontsize=8)
    engine = result["engine"]
    figure.suptitle(f"{engine['vllm']} on {engine['device']}, and the simulator", fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Report one file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    result = json.loads(args.file.read_text())
    print(table(result["runs"]), beside(result), sep="\n")
    if args.plot:
        draw(result, args.plot)


if __name__ == "__main__":
    main()
