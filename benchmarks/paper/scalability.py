"""Ever larger clusters under proportional load: what they serve, and what simulating them takes."""

import re
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.paper.figure import make
from benchmarks.paper.numbers import exact, numbers
from benchmarks.paper.options import Options
from benchmarks.paper.outcome import Outcome
from benchmarks.paper.plots import lines, save
from benchmarks.paper.rates import found
from benchmarks.paper.runs import Run
from benchmarks.paper.systems import INSTANCES, SYSTEMS
from benchmarks.paper.traces import ROWS
from llumnix.simulator.run import simulate
from llumnix.simulator.workload import generate

NAME = "scalability"
ROW = "M-M"
SIZES = {16: 1.0, 64: 4.0, 1000: 10.0}  # instances, and how many times the requests
COMPARED = ("infaas", "llumnix", "ours")
STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The most memory that this process had at once.

    Linux's ru_maxrss counts also what the process was forked from, before it was this program.
    """
    if STATUS.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(one: Run) -> dict[str, Any]:
    """Run in this process, which has done nothing else before."""
    jobs = generate(one.workload, one.seed).jobs
    result = simulate(one.cluster, jobs, seed=one.seed)
    peak = peak_bytes()
    return {
        "numbers": numbers([Outcome.of(result)]),
        "virtual_seconds": exact(result.seconds),
        "wall_seconds": round(result.wall_seconds, 1),
        "peak_megabytes": round(peak / 1e6),
    }


def points(options: Options) -> list[dict[str, Any]]:
    """One process at a time, so that each has a core of its own."""
    row, rate = ROWS[ROW], found(ROW)
    sizes = dict(list(SIZES.items())[:1]) if options.quick else SIZES
    made = []
    with tqdm(total=len(sizes) * len(COMPARED), desc=NAME, unit="run") as bar:
        for size, factor in sizes.items():
            requests = int(options.requests * factor)
            workload = row.workload(requests, exact(rate * size / INSTANCES))
            point: dict[str, Any] = {"instances": size, "requests": requests, "systems": {}}
            for name in COMPARED:
                run = Run(SYSTEMS[name].cluster(row.threshold, size), workload, options.seeds[0])
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    point["systems"][name] = pool.submit(measure, run).result()
                bar.update()
            made.append(point)
    return made


def draw(result: dict[str, Any], options: Options) -> None:
    """The tail of the prefill, and the time and memory of the simulation, over the size."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    sizes = [point["instances"] for point in result["points"]]
    wanted: dict[str, Callable[[Any], float]] = {
        "P99 prefill (s)": lambda one: one["numbers"]["prefill"]["p99"],
        "wall time (s)": lambda one: one["wall_seconds"],
        "peak memory (MB)": lambda one: one["peak_megabytes"],
    }
    for axes, (name, of) in zip(figure.subplots(1, 3), wanted.items(), strict=True):
        series = {
            system: (sizes, [of(point["systems"][system]) for point in result["points"]])
            for system in COMPARED
        }
        lines(axes, series, "instances", name)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
    save(figure, options.figures / f"{NAME}.png")


def measure_all(options: Options) -> dict[str, Any]:
    """Run everything, with the first seed."""
    seed = options.seeds[0]
    return {"seed": seed, "trace": ROW, "rate": found(ROW), "points": points(options)}


def main(argv: list[str] | None = None) -> None:
    """Run, write the JSON and draw."""
    make(NAME, __doc__, argv, measure_all, draw)


if __name__ == "__main__":
    main()
