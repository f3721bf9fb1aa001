"""What a live migration costs: the gap in the moved stream, and the slow-down of all others.

    python benchmarks/migration.py [--json FILE] [--plots FOLDER]

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

CONTEXTS = (256, 512, 1024, 2048)
WARM = 24  # tokens before a stream is moved


async def moved(stage: Stage, how: str, context: int, number: int) -> dict[str, float]:
    """One stream of so many prompt tokens is moved once; the gap in it, in seconds."""
    stream = stage.open(request_of(f"{how}-{context}-{number}", context, number, 160))
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
        # One more round, to warm up.
        runs = [await moved(stage, how, context, n) for n in range(rounds + 1)][1:]
        middle = {name: statistics.median(r[name] for r in runs) for name in runs[0]}
        worst = max(r["gap"] for r in runs)
        rows.append({"context": context, "how": how, "worst_gap": worst, **middle, "runs": runs})
    return rows


async def slow_down(stage: Stage, seconds: float, others: int, context: int) -> dict[str, Any]:
    """Step times of other streams on both engines, with one more stream moving to and fro or not.

    Windows of both kinds take turns, so that whatever else the machine does meets both.
    """
    crowd = [
        stage.open(request_of(f"other-{n}", 64, n, 100_000), stage.instances[n % 2])
        for n in range(2 * others)
    ]
    traveller = stage.open(request_of("traveller", context, 99, 100_000))
    for stream in (*crowd, traveller):
        await stream.reach(8)
    times: dict[bool, list[float]] = {False: [], True: []}
    moves = [0, 0.0]  # number, CPU seconds of the transfers
    for window in tqdm(range(8), desc="slow-down", disable=None):
        moving = window % 2 == 1
        began = time.monotonic()
        cpu = stage.copy_cpu_seconds()
        while time.monotonic() - began < seconds / 8:
            if moving:
                _, destination = stage.ends(traveller)
                await stage.move(traveller, destination, "live", fresh=True)
                moves[0] += 1
            else:
                await asyncio.sleep(0.1)
        ended = time.monotonic()
        moves[1] += stage.copy_cpu_seconds() - cpu
        for stream in crowd:
            times[moving] += [s for s, at in stream.steps(since=began) if at <= ended]
    for stream in (*crowd, traveller):
        await stage.end(stream)
    still, moving_mean = statistics.mean(times[False]), statistics.mean(times[True])
    spent = sum(times[True]) / (2 * others)  # wall seconds in the moving windows
    copy_share = moves[1] / 2 / spent  # of each engine's core
    return {
        "others": others,
        "context": context,
        "migrations": moves[0],
        "migrations_per_second": moves[0] / spent,
        "step": still,
        "step_while_migrating": moving_mean,
        "slow_down": moving_mean / still - 1,
        "copy_share_of_a_core": copy_share,
        "slow_down_beyond_copy": moving_mean / still - 1 - copy_share,
    }


async def identity(stage: Stage, number: int, context: int) -> dict[str, int]:
    """How many of so many requests give the same tokens when they move as when they stay.

    Beside it how many do in two runs without a move: an engine may differ from itself.
    """
    same = {"requests": number, "moved": 0, "unmoved": 0}
    for n in tqdm(range(number), desc="identity", disable=None):
        first = request_of(f"same-{n}", context + 7 * n, n, 200)
        first.sampling_params = SamplingParams(
            temperature=0.0 if n % 2 else 0.9,
            seed=n,
            frequency_penalty=0.2,
            max_tokens=200,
            ignore_eos=True,
        )
        runs = []
        for run in range(3):
            request = copy.deepcopy(first)
            request.request_id = f"{first.request_id}-{run}"
            stream = stage.open(request, stage.instances[0])
            if run == 0:
                await stream.reach(20 + 11 * n % 100)
                await stage.move(stream, stage.instances[1], "live")
            await stream.reach(200)
            await stage.end(stream)
            runs.append(stream.tokens)
        same["moved"] += runs[0] == runs[1]
        same["unmoved"] += runs[1] == runs[2]
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
        lines += ["", "| other streams, a step | |", "|---|---|"]
        lines += [f"| without migrations | {slow['step'] * 1e3:.2f} ms |"]
        rate, step = slow["migrations_per_second"], slow["step_while_migrating"] * 1e3
        lines += [f"| with {rate:.1f} migrations a second | {step:.2f} ms |"]
        lines += [f"| slow-down | {slow['slow_down']:+.1%} |"]
        lines += [f"| the copy's own share of a core | {slow['copy_share_of_a_core']:.1%} |"]
    return "\n".join(lines)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements on one pair of engines."""
    async with make_stage(args.model, args.engine_args, args.timeout) as stage:
        result: dict[str, Any] = {"model": Path(args.model).name, "device": stage.device}
        if args.identity:
            result["identity"] = await identity(stage, args.identity, args.contexts[0])
            print(f"the same tokens: {result['identity']}", flush=True)
        result["gaps"] = await gaps(stage, args.rounds, args.contexts)
        if args.seconds:
            result["slow_down"] = await slow_down(
                stage, args.seconds, args.others, args.contexts[0]
            )
    return result


def main() -> None:
    """Measure, print a table, write JSON and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="default: the small model of `make model`")
    parser.add_argument("--rounds", type=int, default=5, help="moves of each kind and length")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="prompt tokens")
    parser.add_argument("--identity", type=int, default=0, help="requests to compare with unmoved")
    parser.add_argument("--seconds", type=float, default=80.0, help="for the slow-down; 0: without")
    parser.add_argument("--others", type=int, default=2, help="other streams on each engine")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds for the engines to start"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    args, args.engine_args = parser.parse_known_args()
    logging.getLogger("llumnix").setLevel(logging.WARNING)
    args.model = args.model or model_folder()
    result = asyncio.run(run(args))
    print(table(result["gaps"], result.get("slow_down")))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))
    if args.plots:
        from benchmarks.migration_plots import draw

        draw(result, args.plots)


if __name__ == "__main__":
    main()
