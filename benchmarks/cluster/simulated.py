"""The same requests in the simulator: how far its ratios between systems are those of real engines.

    python -m benchmarks.cluster.simulated RESULTS --instances 8 --kv-blocks 851 \\
        --profile 25e-3 50e-6 0 25e-3 50e-6 0.4e-6 10e-3 [--json FILE]

Each run in the results is made again in virtual time: its requests, its policies, and its end, at
which a request without a first token counts as having waited until then, as in the real run.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.cluster.figures import figures
from benchmarks.cluster.load import Row
from benchmarks.cluster.results import Run, read
from benchmarks.cluster.table import line
from benchmarks.cluster.workload import Shape
from llumnix.latency import LatencyProfile
from llumnix.simulator.cluster import ClusterConfig, EngineConfig, PolicyConfig
from llumnix.simulator.result import Story
from llumnix.simulator.run import simulate
from llumnix.simulator.workload import SimJob

# What the systems of `systems.KNOWN` decide by: dispatch and rescheduling.
POLICIES = {
    "llumnix": PolicyConfig(dispatch="load", rescheduling="queues"),
    "llumnix-queue": PolicyConfig(dispatch="queue"),
    "llumnix-rr": PolicyConfig(dispatch="rr"),
    "llumnix-paper": PolicyConfig(dispatch="freeness", rescheduling="llumnix"),
}
QUANTITIES = (("ttft", "mean"), ("ttft", "p99"), ("tpot", "mean"), ("tpot", "p99"))


class Pair(NamedTuple):
    """A run as it was, and as the simulator has it."""

    run: Run
    simulated: dict[str, Any]  # figures, as the run's

    def ratio(self, quantity: str, number: str) -> float:
        """Simulated over real."""
        return float(self.simulated[quantity][number] / self.run["figures"][quantity][number])


def again(run: Run, cluster: ClusterConfig) -> Pair:
    """Simulate the requests of a run."""
    shape = Shape(run["shape"])
    count, longest = run["figures"]["requests"], cluster.engine.max_model_len
    requests = shape.requests(run["rate"], run["cv"], count, run["seed"], longest)
    jobs = [SimJob(number, r.at, r.prompt, r.output) for number, r in enumerate(requests)]
    until = requests[-1].at + run["drain"]
    stories = simulate(cluster, jobs, seed=run["seed"]).stories
    rows = [_row(number, story, until) for number, story in enumerate(stories)]
    return Pair(run, figures(rows, requests, until))


def _row(number: int, story: Story, until: float) -> Row:
    """What a client that leaves at the end would have seen."""
    times = [at for at in story.times if at <= until]
    if not times:
        return Row(number, 0.0, 0.0, 0.0, 0.0, 0, "unfinished")
    gap = max((b - a for a, b in pairwise(times)), default=0.0)
    due = story.job.at
    left = "" if len(times) == story.job.output else "unfinished"
    return Row(number, 0.0, times[0] - due, times[-1] - due, gap, len(times), left)


def table(pairs: Sequence[Pair], base: str) -> str:
    """For each rate the gain over `base`, real and simulated, as Markdown."""
    head = ["requests/s", "seed", "system"]
    head += [f"{q.upper()} {n}: real, simulated" for q, n in QUANTITIES]
    lines = [line(head), "|---" * len(head) + "|"]
    known = {(p.run["shape"], p.run["rate"], p.run["seed"], p.run["system"]): p for p in pairs}
    for (shape, rate, seed, system), pair in sorted(known.items(), key=lambda one: one[0][:3]):
        other = known.get((shape, rate, seed, base))
        if other is None or system == base:
            continue
        cells = [f"{rate:g}", str(seed), system]
        for quantity, number in QUANTITIES:
            real = other.run["figures"][quantity][number] / pair.run["figures"][quantity][number]
            ours = other.simulated[quantity][number] / pair.simulated[quantity][number]
            cells.append(f"{real:.2f}, {ours:.2f}")
        lines.append(line(cells))
    lines += ["", "Simulated over real:", ""]
    head = ["requests/s", "seed", "system", *(f"{q.upper()} {n}" for q, n in QUANTITIES)]
    lines += [line(head), "|---" * len(head) + "|"]
    for (_, rate, seed, system), pair in sorted(known.items()):
        cells = [f"{rate:g}", str(seed), system]
        lines.append(line([*cells, *(f"{pair.ratio(q, n):.2f}" for q, n in QUANTITIES)]))
    return "\n".join(lines)


def main() -> None:
    """Simulate all runs of the files, and print how they compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("results", type=Path, nargs="+")
    add("--instances", type=int, required=True)
    add("--kv-blocks", type=int, required=True, help="of each instance, as vLLM was told")
    add("--block-size", type=int, default=16)
    add("--max-model-len", type=int, default=4096)
    add("--max-num-batched-tokens", type=int, default=2048)
    add("--profile", type=float, nargs=7, required=True, help="a b c d e f of latency.py, outside")
    add("--cost", default="llama-7b-h200x2", help="of a move, a key of simulator/cluster.py")
    add("--base", default="llumnix-queue", help="whom the others are compared with")
    add("--json", type=Path)
    args = parser.parse_args()
    *coefficients, outside = args.profile
    engine = EngineConfig(
        profile=LatencyProfile(*coefficients, outside=outside),
        total_blocks=args.kv_blocks - 1,  # vLLM keeps one, the null block
        block_size=args.block_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        prefill_first=False,
        async_scheduling=True,
        watermark=0.0,
    )
    runs = read(args.results)["runs"]
    pairs = []
    for run in tqdm([run for run in runs if run["system"] in POLICIES], disable=None):
        policy = POLICIES[run["system"]]
        cluster = ClusterConfig(args.instances, engine, policy, migration=args.cost)
        pairs.append(again(run, cluster))
    print(table(pairs, args.base))
    if args.json:
        found = [{"id": p.run["id"], "simulated": p.simulated} for p in pairs]
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
