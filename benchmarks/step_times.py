"""Measures how long the steps of a real vLLM engine take, and fits a latency profile to them.

    python benchmarks/step_times.py --model MODEL [--json FILE] [--yaml FILE] [vLLM options]

The YAML file is what `--latency-profile` takes, and `cluster: engine: profile:` of `llumnix-sim`.

A decode step is the time between two tokens while so many requests decode. A step with prefill is
measured where it matters: a prompt comes while others decode, and its step is what their tokens are
late by, and one usual step. So all steps follow others, as they do under load, and what a request
costs outside of steps is not in them. That is measured by itself: the time to the first token of a
prompt alone on the engine, less its step.
"""

import argparse
import asyncio
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from engine_streams import Engine, Stream, running
from latency_fit import Step, errors, fit
from neighbours import Neighbours

from llumnix.latency import LatencyProfile

SPAN = 5  # decode steps that are timed together
BEFORE = 20  # decode steps before a prompt comes, whose mean is the usual one


@dataclass(frozen=True)
class Grid:
    """What is measured."""

    prefills: tuple[int, ...]  # tokens of a prompt
    decodes: tuple[tuple[int, int], ...]  # requests, and the context of each in tokens
    beside: tuple[tuple[int, int], ...]  # the same, for what decodes while prompts come
    rounds: int  # prompts of each length
    steps: int  # decode steps of each kind, a multiple of SPAN


GRIDS = {
    "small": Grid(
        (16, 32, 64, 128, 256, 512),
        ((1, 32), (1, 512), (2, 128), (4, 64), (4, 256), (8, 64), (8, 256), (16, 64), (16, 128)),
        ((1, 64), (4, 64)),
        5,
        25,
    ),
    "large": Grid(
        (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2000),
        (
            *((1, 128), (1, 2048), (4, 512), (8, 512), (16, 256), (16, 2048), (32, 128), (32, 512)),
            *((32, 2048), (64, 128), (64, 512), (64, 1024), (128, 128), (128, 512), (192, 256)),
        ),
        ((1, 128), (16, 512), (48, 256)),
        7,
        40,
    ),
}


async def decode_step(engine: Engine, batch: int, context: int, steps: int) -> Step:
    """The time between two tokens while a batch decodes: the median of means over some steps.

    A client that is late reads two tokens at once, so a single gap may be no step at all.
    """
    streams = await _decoding(engine, batch, context)
    first = streams[0]
    begun = len(first.times)
    await first.reach(begun + steps // 2)
    tokens = _context(streams)
    await first.reach(begun + steps)
    times = first.times[begun - 1 : begun + steps]
    await _end(streams)
    means = [(b - a) / SPAN for a, b in itertools.pairwise(times[::SPAN])]
    return Step(0, batch, tokens, statistics.median(means))


async def mixed_steps(
    engine: Engine, prompts: Sequence[int], batch: int, context: int, rounds: int
) -> list[Step]:
    """The median time of a step with a whole prompt of each length, while a batch decodes."""
    streams = await _decoding(engine, batch, context)
    steps = []
    for prompt in prompts:
        if prompt + batch > engine.config.scheduler_config.max_num_batched_tokens:
            continue  # it would take two steps
        before = _context(streams)
        seconds = [await _mixed(engine, prompt, streams[0]) for _ in range(rounds)]
        tokens = (before + _context(streams)) // 2
        steps.append(Step(prompt, batch, tokens, statistics.median(seconds)))
    await _end(streams)
    return steps


async def _mixed(engine: Engine, prompt: int, other: Stream) -> float:
    """What the prompt's step takes: the time around it, less that of the other steps in it.

    Which of the gaps is the step does not show: with asynchronous scheduling the engine is a step
    ahead, and a client may read late.
    """
    await other.reach(len(other.times) + BEFORE)
    last = len(other.times) - 1
    usual = (other.times[last] - other.times[last - BEFORE]) / BEFORE
    stream = engine.open(prompt, 1)
    await stream.reach(1)
    await other.reach(len(other.times) + 3)
    end = len(other.times) - 1
    return other.times[end] - other.times[last] - (end - last - 1) * usual


async def first_token(engine: Engine, prompt: int, rounds: int) -> float:
    """The median time to the first token of a prompt that is alone on the engine."""
    seconds = []
    for _ in range(rounds):
        await asyncio.sleep(0.05)
        stream = engine.open(prompt, 1)
        await stream.reach(1)
        seconds.append(stream.times[0] - stream.sent)
    return statistics.median(seconds)


async def _decoding(engine: Engine, batch: int, context: int) -> list[Stream]:
    """So many requests of about so much context each, all past their first tokens."""
    room = engine.config.model_config.max_model_len - context
    streams = [engine.open(context, room) for _ in range(batch)]
    for stream in streams:
        await stream.reach(3)
    return streams


def _fits(engine: Engine, batch: int, context: int) -> bool:
    """Whether all can decode at once, with some room to spare; else some would wait."""
    cache = engine.config.cache_config
    longest = engine.config.model_config.max_model_len
    blocks = batch * (context // cache.block_size + 2)
    return context < longest and blocks < 0.95 * (cache.num_gpu_blocks or 0)


async def _end(streams: Sequence[Stream]) -> None:
    for stream in streams:
        await stream.end()
    await asyncio.sleep(0.2)  # for the engine to drop them


def _context(streams: Sequence[Stream]) -> int:
    return sum(stream.prompt + len(stream.times) for stream in streams)


async def measure(engine: Engine, grid: Grid) -> dict[str, Any]:
    """All steps, the profile that fits them, and the times to first tokens on an idle engine."""
    limits, neighbours = engine.config.scheduler_config, Neighbours()
    for prompt in (*grid.prefills, *grid.prefills):  # what is compiled at its first use
        if prompt <= limits.max_num_batched_tokens:
            await first_token(engine, prompt, 1)
    steps: list[Step] = []
    for batch, context in grid.decodes:
        if batch <= limits.max_num_seqs and _fits(engine, batch, context + grid.steps):
            steps.append(await decode_step(engine, batch, context, grid.steps))
            print(_told(steps[-1]), flush=True)
    for batch, context in grid.beside:
        for step in await mixed_steps(engine, grid.prefills, batch, context, grid.rounds):
            steps.append(step)
            print(_told(step), flush=True)
    alone = {n: await first_token(engine, n, grid.rounds) for n in grid.prefills}
    profile = fit(steps)
    outside = [alone[n] - profile.step_seconds(n, 0, 0) for n in alone]
    profile = replace(profile, outside=max(statistics.median(outside), 0.0))
    return {
        "profile": asdict(profile),
        "cores_of_others": neighbours.cores,
        "steps": [
            {**step._asdict(), "error": error}
            for step, error in zip(steps, errors(profile, steps), strict=True)
        ],
        "alone": [{"prefill": n, "seconds": alone[n], "fitted": _alone(profile, n)} for n in alone],
    }


def _alone(profile: LatencyProfile, prompt: int) -> float:
    return profile.step_seconds(prompt, 0, 0) + profile.outside


def _told(step: Step) -> str:
    beside = f"{step.batch} decoding with {step.context} tokens"
    return f"{step.prefill:5} tokens of prefill, {beside}: {step.seconds * 1e3:.2f} ms"


def show(measured: dict[str, Any]) -> None:
    """The fit, and how far it is off."""
    for name, value in measured["profile"].items():
        print(f"{name}: {value:.4g}")
    for kind, has in (("decode", False), ("prefill", True)):
        off = [abs(s["error"]) for s in measured["steps"] if bool(s["prefill"]) is has]
        print(f"{kind}: mean error {statistics.fmean(off):.1%}, largest {max(off):.1%}")


def write_yaml(profile: dict[str, float], file: Path) -> None:
    """The profile as the options take it."""
    file.write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What measuring takes."""
    parser.add_argument("--grid", choices=GRIDS, default="small")
    parser.add_argument("--rounds", type=int, help="prompts of each length; default: the grid's")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--yaml", type=Path, help="the profile, for --latency-profile")


def grid_of(args: argparse.Namespace) -> Grid:
    """The grid that the options ask for."""
    grid = GRIDS[args.grid]
    return replace(grid, rounds=args.rounds) if args.rounds else grid


async def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_options(parser)
    args, options = parser.parse_known_args()
    async with running(options) as engine:
        result = {"engine": engine.facts(), **await measure(engine, grid_of(args))}
    show(result)
    if args.yaml:
        write_yaml(result["profile"], args.yaml)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
