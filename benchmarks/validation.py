"""Compares the simulator with a real vLLM engine on the same requests.

    python benchmarks/validation.py --model MODEL --json FILE [--plot FILE] [vLLM options]

First the engine's steps are measured as `step_times.py` does, and a latency profile is fitted to
them. Then a seeded workload runs open loop on that engine, at shares of the rate that the simulator
says it can bear, and the same requests are simulated with that profile and the engine's own sizes
and rules. Nothing of the simulator is set by what the workload shows.
"""

import argparse
import asyncio
import json
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import step_times
from engine_streams import Engine, Stream, running
from neighbours import Neighbours
from validation_report import NUMBERS, QUANTITIES, beside, draw, table

from llumnix.latency import LatencyProfile
from llumnix.simulator.cluster import ClusterConfig, EngineConfig
from llumnix.simulator.distributions import ArrivalProcess, PowerLaw
from llumnix.simulator.result import Story
from llumnix.simulator.run import simulate
from llumnix.simulator.summary import Spread, spread
from llumnix.simulator.workload import SimJob, Workload, generate

COLUMNS = ("prompt", "output", "real_ttft", "real_tpot", "simulated_ttft", "simulated_tpot")


def cluster_of(facts: dict[str, Any], profile: LatencyProfile) -> ClusterConfig:
    """One simulated instance of the engine's own size and rules."""
    sizes = ("total_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")
    engine = EngineConfig(
        profile=profile,
        **{size: facts[size] for size in sizes},
        max_model_len=facts["max_model_len"],
        prefill_first=False,
        async_scheduling=facts["async_scheduling"],
        watermark=0.0,
    )
    return ClusterConfig(instances=1, engine=engine)


def jobs_of(args: argparse.Namespace, arrivals: ArrivalProcess, longest: int) -> list[SimJob]:
    """The same requests for each rate, only more or less crowded."""
    lengths = PowerLaw(args.mean, args.alpha, args.cap)
    workload = Workload(args.requests, arrivals, lengths, lengths, max_tokens=longest)
    return generate(workload, args.seed).jobs


def capacity(args: argparse.Namespace, cluster: ClusterConfig) -> float:
    """Requests a second that the simulated engine completes when all come at once."""
    jobs = jobs_of(args, ArrivalProcess("burst"), cluster.engine.max_model_len)
    return len(jobs) / simulate(cluster, jobs).seconds


async def replay(engine: Engine, jobs: Sequence[SimJob]) -> list[Story]:
    """Run the requests on the real engine, each at its time, whatever became of those before."""
    streams: list[Stream] = []
    began = time.monotonic()
    for job in jobs:
        await asyncio.sleep(max(began + job.at - time.monotonic(), 0.0))
        streams.append(engine.open(job.prompt, job.output))
    stories = []
    for job, stream in zip(jobs, streams, strict=True):
        await stream.reach(job.output)
        stories.append(Story(job, "real", array("d", (at - began for at in stream.times))))
    return stories


def spreads(stories: Sequence[Story]) -> dict[str, Spread]:
    """Time to first token and per further token, in seconds."""
    return {
        "ttft": spread([story.prefill for story in stories]),
        "tpot": spread([story.decode for story in stories if len(story.times) > 1]),
    }


def compare(real: Sequence[Story], simulated: Sequence[Story]) -> dict[str, Any]:
    """The numbers of both, the simulator's relative errors, and each request's own times."""
    ours, theirs = spreads(simulated), spreads(real)
    errors = {
        quantity: {
            number: getattr(ours[quantity], number) / getattr(theirs[quantity], number) - 1
            for number in NUMBERS
        }
        for quantity in QUANTITIES
    }
    rows = [
        [a.job.prompt, a.job.output, *(round(x, 6) for x in (a.prefill, a.decode))]
        + [round(x, 6) for x in (b.prefill, b.decode)]
        for a, b in zip(real, simulated, strict=True)
    ]
    return {
        "real": {name: asdict(one) for name, one in theirs.items()},
        "simulated": {name: asdict(one) for name, one in ours.items()},
        "errors": errors,
        "seconds": {"real": ended_at(real), "simulated": ended_at(simulated)},
        "columns": list(COLUMNS),
        "requests": rows,
    }


def ended_at(stories: Sequence[Story]) -> float:
    """Seconds until the last token."""
    return max(story.times[-1] for story in stories)


async def drift(engine: Engine, measured: dict[str, Any], steps: int) -> float:
    """A decode step measured anew, over what it took at first: what the machine itself does."""
    before = [s for s in measured["steps"] if not s["prefill"]]
    one = before[len(before) // 2]
    context = one["context"] // one["batch"] - steps // 2 - 3
    again = await step_times.decode_step(engine, one["batch"], max(context, 1), steps)
    return again.seconds / float(one["seconds"])


async def validate(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Profile, then all rates."""
    facts, grid = engine.facts(), step_times.grid_of(args)
    began = time.monotonic()
    measured = await step_times.measure(engine, grid)
    step_times.show(measured)
    print(f"measured in {time.monotonic() - began:.0f} s", flush=True)
    cluster = cluster_of(facts, LatencyProfile(**measured["profile"]))
    most = args.capacity or capacity(args, cluster)
    result = {"engine": facts, **measured, "workload": workload_of(args), "capacity": most}
    runs: list[dict[str, Any]] = []
    for share in args.shares:
        jobs = jobs_of(args, ArrivalProcess("poisson", share * most), facts["max_model_len"])
        neighbours = Neighbours()
        real = await replay(engine, jobs)
        run = {"share": share, "rate": share * most, "cores_of_others": neighbours.cores}
        run |= compare(real, simulate(cluster, jobs).stories)
        run["drift"] = await drift(engine, measured, grid.steps)
        runs.append(run)
        print(table([run]), flush=True)
    return {**result, "runs": runs}


def workload_of(args: argparse.Namespace) -> dict[str, Any]:
    """What is drawn, for the record."""
    return {key: getattr(args, key) for key in ("requests", "mean", "alpha", "cap", "seed")}


async def main() -> None:
    """Measure, compare, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    step_times.add_options(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.6, 0.9])
    parser.add_argument("--capacity", type=float, help="requests a second; default: as simulated")
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--mean", type=int, default=128, help="tokens of prompts, and of outputs")
    parser.add_argument("--alpha", type=float, default=2.0)
    parser.add_argument("--cap", type=int, default=1024, help="tokens of prompts, and of outputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    args, options = parser.parse_known_args()
    async with running(options) as engine:
        result = await validate(engine, args)
    print(table(result["runs"]), beside(result), sep="\n")
    if args.yaml:
        step_times.write_yaml(result["profile"], args.yaml)
    if args.json:
        args.json.write_text(json.dumps(result, indent=None, separators=(",", ":")) + "\n")
    if args.plot:
        draw(result, args.plot)


if __name__ == "__main__":
    asyncio.run(main())
