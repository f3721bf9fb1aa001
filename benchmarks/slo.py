"""How many requests of a class meet their targets, by dispatch policy, in the simulator.

    python benchmarks/slo.py --json docs/results/slo.json

Half of the requests (L prompts, M outputs, Poisson) are of a class with tight targets, the others
of one with loose ones, on eight instances of LLaMA-7B on H100 with chunked prefill.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llumnix.policy.priority_classes import PriorityClass
from llumnix.simulator.cluster import ClusterConfig, EngineConfig, PolicyConfig
from llumnix.simulator.distributions import ArrivalProcess
from llumnix.simulator.result import Result
from llumnix.simulator.run import simulate
from llumnix.simulator.workload import Workload, generate

POLICIES = ("rr", "queue", "load", "slo")
RATES = (60.0, 90.0, 120.0)  # requests a second
CHAT = PriorityClass("chat", -1, ttft=0.5, tpot=0.02)
BATCH = PriorityClass("batch", 0, ttft=5.0, tpot=0.06)
H100 = EngineConfig(
    profile="llama-7b-h100",
    total_blocks=6846,
    max_num_batched_tokens=2048,
    max_model_len=12_300,
    prefill_first=False,
    watermark=0.0,
)


class Run(NamedTuple):
    """One simulation."""

    rate: float
    policy: str
    seed: int
    requests: int


def runs(seeds: list[int], requests: int) -> Iterator[Run]:
    """All simulations of the figure."""
    for rate in RATES:
        for policy in POLICIES:
            for seed in seeds:
                yield Run(rate, policy, seed, requests)


def attainment(run: Run) -> dict[str, float]:
    """The share of each class that met both of its targets, and of the tight one each of them."""
    workload = Workload(
        requests=run.requests,
        arrivals=ArrivalProcess("poisson", rate=run.rate),
        prompt="long",
        output="medium",
        priorities={CHAT.priority: 0.5},
    )
    policy = PolicyConfig(dispatch=run.policy, classes=(CHAT, BATCH))
    config = ClusterConfig(8, H100, policy, migration="llama-7b-h100")
    result = simulate(config, generate(workload, run.seed).jobs, seed=run.seed)
    return {
        "chat": _met(result, CHAT),
        "batch": _met(result, BATCH),
        "chat ttft": _met(result, PriorityClass("", CHAT.priority, ttft=CHAT.ttft)),
        "chat tpot": _met(result, PriorityClass("", CHAT.priority, tpot=CHAT.tpot)),
    }


def _met(result: Result, wanted: PriorityClass) -> float:
    stories = [s for s in result.stories if s.job.priority == wanted.priority]
    met = sum(s.prefill <= wanted.ttft and s.decode <= wanted.tpot for s in stories)
    return round(met / len(stories), 4)


def main() -> None:
    """Simulate, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, help="processes (default: one for each core)")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    todo = list(runs(args.seeds, args.requests))
    with ProcessPoolExecutor(args.jobs) as pool:
        found = list(tqdm(pool.map(attainment, todo), total=len(todo)))
    table = _table(todo, found)
    print(f"{'rate':>5} {'policy':8}{'chat':>22}{'batch':>22}")
    for row in table:
        chat, batch = (_shown(row[name]) for name in ("chat", "batch"))
        print(f"{row['rate']:5.0f} {row['policy']:8}{chat:>22}{batch:>22}")
    if args.json:
        setup = {"seeds": args.seeds, "requests": args.requests, "chat": vars_of(CHAT)}
        setup["batch"] = vars_of(BATCH)
        args.json.write_text(json.dumps({"setup": setup, "rows": table}, indent=1) + "\n")


def vars_of(made: PriorityClass) -> dict[str, float]:
    """A class as JSON has it."""
    return {"priority": made.priority, "ttft": made.ttft, "tpot": made.tpot}


def _table(todo: list[Run], found: list[dict[str, float]]) -> list[dict[str, Any]]:
    rows: dict[tuple[float, str], dict[str, Any]] = {}
    for run, shares in zip(todo, found, strict=True):
        row = rows.setdefault((run.rate, run.policy), {"rate": run.rate, "policy": run.policy})
        for name, share in shares.items():
            row.setdefault(name, []).append(share)
    return list(rows.values())


def _shown(shares: list[float]) -> str:
    """The mean over seeds, and the lowest and highest."""
    mean = sum(shares) / len(shares)
    return f"{mean:.1%} ({min(shares):.1%}-{max(shares):.1%})"


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
