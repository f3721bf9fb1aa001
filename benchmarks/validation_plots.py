"""Draws what `validation.py` has compared.

python benchmarks/validation_plots.py FILE PNG
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

QUANTITIES = {"ttft": "time to first token (ms)", "tpot": "time per further token (ms)"}


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
    """Draw the plot of one file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.file.read_text()), args.png)


if __name__ == "__main__":
    main()
