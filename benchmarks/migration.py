"""What a live migration costs: the gap in the moved stream, and the slow-down of all others.

    python benchmarks/migration.py [--json FILE]
    python benchmarks/migration_plots.py FILE FOLDER

Two vLLM engines, each a process of its own, on the parts that a node is made of: the hosted
instances, the exchange, the ledger, the migration actor with its record in a real etcd. Only HTTP
is left out. On a machine with a GPU the same script moves the KV cache over NCCL.
"""

import argparse
import asyncio
import copy
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm
from vllm import SamplingParams

from benchmarks.migration_stage import Stage, make_stage, request_of
from benchmarks.servers import model_folder
from llumnix.node.engines import ladder

CONTEXTS = (256, 512, 1024, 2048)
WARM = 24  # tokens before a stream is moved


async def moved(stage: Stage, how: str, context: int, number: int) -> dict[str, float]:
    """One stream of so many prompt tokens is moved once; the gap in it, in seconds."""
    stream = stage.open(request_of(f"{how}-{context}-{number}", context, number, 2000))
    await stream.reach(WARM)
    _, destination = stage.ends(stream)
    began = time.monotonic()
    report = await stage.move(stream, destination, how)
    ended = time.monotonic()
    await stream.reach(stream.position + WARM)
    await stage.end(stream)
    away = [t for t, _ in stream.steps(until=began)]
    return {
        "gap": stream.widest(began, ended + 2.0),
        "step": statistics.median(away[2:]),
        "seconds": ended - began,
        **report,
    }


async def gaps(stage: Stage, rounds: int, contexts: Sequence[int]) -> list[dict[str, Any]]:
    """The gap of each way to move a stream, at each length."""
    rows = []
    jobs = [(c, how) for c in contexts for how in ("live", "copy", "recompute")]
    for context, how in tqdm(jobs, desc="gaps", disable=None):
        # One more round, to warm up; the very first is the pair's first move.
        first, *runs = [await moved(stage, how, context, n) for n in range(rounds + 1)]
        middle = {name: statistics.median(r[name] for r in runs) for name in runs[0]}
        worst = max(r["gap"] for r in runs)
        row = {"context": context, "how": how, "worst_gap": worst, **middle}
        rows.append(row | {"first": first, "runs": runs})
    return rows


async def slow_down(stage: Stage, cycles: int, others: int, context: int) -> dict[str, Any]:
    """Step times of other streams on both engines, while one more stream moves between them or not.

    In each cycle a new stream comes, which nothing is cached of yet, and is moved in every second
    one; in the others a span of the same length is looked at, in which it stays where it is.
    """
    crowd = [
        stage.open(request_of(f"other-{n}", 64, n, 100_000), stage.instances[n % 2])
        for n in range(2 * others)
    ]
    for stream in crowd:
        await stream.reach(8)
    steps: dict[str, list[float]] = {"still": [], "source": [], "destination": []}
    copying, moving, span = 0.0, 0.0, 0.5  # seconds: CPU of transfers, of moves, of the last one
    for cycle in tqdm(range(cycles), desc="slow-down", disable=None):
        source = stage.instances[cycle // 2 % 2]
        traveller = stage.open(request_of(f"traveller-{cycle}", context, cycle, 1000), source)
        await traveller.reach(4)
        _, destination = stage.ends(traveller)
        cpu, began = stage.copy_cpu_seconds(), time.monotonic()
        moves = cycle % 2 == 1
        if moves:
            await stage.move(traveller, destination, "live")
            await traveller.reach(traveller.position + 1)
            span = time.monotonic() - began
            moving += span
            copying += stage.copy_cpu_seconds() - cpu
        else:
            await asyncio.sleep(span)
        ended = time.monotonic()
        for number, stream in enumerate(crowd):
            here = stage.instances[number % 2]
            role = "still" if not moves else "source" if here == source else "destination"
            # A step that began within the span; the first belongs to what was before.
            steps[role] += [s for s, at in stream.steps(since=began) if at <= ended]
        await stage.end(traveller)
    for stream in crowd:
        await stage.end(stream)
    still = statistics.mean(steps["still"])
    share = copying / 2 / moving  # of each engine's core
    slower = {r: statistics.mean(steps[r]) / still - 1 for r in ("source", "destination")}
    return {
        "others": others,
        "context": context,
        "migrations": cycles // 2,
        "seconds_a_migration": moving / (cycles // 2),
        "step": still,
        "steps": {role: len(found) for role, found in steps.items()},
        "slow_down": slower,
        "copy_share_of_a_core": share,
        "slow_down_beyond_copy": {role: value - share for role, value in slower.items()},
    }


async def identity(stage: Stage, number: int, context: int) -> dict[str, int]:
    """How many of so many requests give the same tokens when they move as when they stay.

    Beside it how many do when they stay in company: another batch rounds otherwise, so an engine
    may differ from itself.
    """
    same = {"requests": number, "moved": 0, "in company": 0}
    for n in tqdm(range(number), desc="identity", disable=None):
        first = request_of(f"same-{n}", context + 7 * n, n, 200)
        first.sampling_params = SamplingParams(
            temperature=0.0 if n % 2 else 0.9,
            seed=n,
            frequency_penalty=0.2,
            max_tokens=200,
            ignore_eos=True,
        )
        found = {}
        for how in ("alone", "moved", "in company"):
            request = copy.deepcopy(first)
            request.request_id = f"{first.request_id}-{how}"
            crowd = [
                stage.open(request_of(f"crowd-{c}", 100, c, 2000), stage.instances[0])
                for c in range(3 if how == "in company" else 0)
            ]
            stream = stage.open(request, stage.instances[0])
            if how == "moved":
                await stream.reach(20 + 11 * n % 100)
                await stage.move(stream, stage.instances[1], "live")
            await stream.reach(200)
            for one in (stream, *crowd):
                await stage.end(one)
            found[how] = stream.tokens
        for how in ("moved", "in company"):
            same[how] += found[how] == found["alone"]
    return same


def table(gap_rows: list[dict[str, Any]], slow: dict[str, Any] | None) -> str:
    """The figures as Markdown."""
    lines = [
        "| tokens | step | live | in steps | stop and copy | recompute |",
        "|---|---|---|---|---|---|",
    ]
    by_context: dict[int, dict[str, dict[str, Any]]] = {}
    for row in gap_rows:
        by_context.setdefault(row["context"], {})[row["how"]] = row
    for context, ways in by_context.items():
        live, copy, again = (ways[how]["gap"] * 1e3 for how in ("live", "copy", "recompute"))
        step = ways["live"]["step"] * 1e3
        lines.append(
            f"| {context} | {step:.1f} ms | {live:.1f} ms | {live / step:.1f} "
            f"| {copy:.0f} ms ({copy / live:.1f}x) | {again:.0f} ms ({again / live:.1f}x) |"
        )
    if slow is not None:
        lines += ["", "| other streams, a step | source | destination |", "|---|---|---|"]
        still, slower = slow["step"], slow["slow_down"]
        ends = ("source", "destination")
        rows = {
            "without a migration": [f"{still * 1e3:.2f} ms"] * 2,
            "during one": [f"{still * (1 + slower[e]) * 1e3:.2f} ms" for e in ends],
            "slow-down": [f"{slower[e]:+.1%}" for e in ends],
            "the copy's own share of a core": [f"{slow['copy_share_of_a_core']:.1%}"] * 2,
            "slow-down beyond that": [f"{slow['slow_down_beyond_copy'][e]:+.1%}" for e in ends],
        }
        lines += [f"| {what} | {' | '.join(values)} |" for what, values in rows.items()]
    return "\n".join(lines)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements on one pair of engines."""
    ways = ladder(args.carrier)
    async with make_stage(args.model, args.engine_args, args.timeout, ways) as stage:
        result: dict[str, Any] = {
            "model": Path(args.model).name,
            "device": stage.device,
            "carrier": ways[0],
        }
        if args.identity:
            result["identity"] = await identity(stage, args.identity, args.contexts[0])
            print(f"the same tokens: {result['identity']}", flush=True)
        result["gaps"] = await gaps(stage, args.rounds, args.contexts) if args.rounds else []
        if args.cycles:
            result["slow_down"] = await slow_down(
                stage, args.cycles, args.others, args.slow_down_context
            )
    return result


def main() -> None:
    """Measure, print a table, write JSON and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="default: the small model of `make model`")
    parser.add_argument(
        "--rounds", type=int, default=5, help="moves of each kind and length; 0: none"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="prompt tokens")
    parser.add_argument("--identity", type=int, default=0, help="requests to compare with unmoved")
    parser.add_argument("--cycles", type=int, default=100, help="of the slow-down; 0: without")
    parser.add_argument("--others", type=int, default=2, help="other streams on each engine")
    parser.add_argument(
        "--slow-down-context", type=int, default=512, help="prompt tokens of what moves"
    )
    parser.add_argument(
        "--carrier", default="auto", help="how blocks go, as the node's --migration-carrier"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds for the engines to start"
    )
    parser.add_argument("--json", type=Path)
    args, args.engine_args = parser.parse_known_args()
    logging.getLogger("llumnix").setLevel(logging.WARNING)
    args.model = args.model or model_folder()
    result = asyncio.run(run(args))
    print(table(result["gaps"], result.get("slow_down")))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
