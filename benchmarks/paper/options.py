"""The options that all figures have."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Options:
    """What to run, how, and where what comes out of it goes."""

    seeds: tuple[int, ...]
    requests: int
    jobs: int
    quick: bool
    traces: Path | None  # the folder of the trace files
    results: Path
    figures: Path
    cache: Path
    page: Path


def read_options(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """The options of one figure's command."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    add("--requests", type=int, default=10_000, help="in each run (default: 10,000)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--quick", action="store_true", help="few points of few requests, to see that it runs")
    add("--traces", type=Path, help="folder of trace files (default: ../shared/traces)")
    add("--results", type=Path, default=ROOT / "docs/results/paper", help="folder for JSON")
    add("--figures", type=Path, default=ROOT / "docs/figures/paper", help="folder for plots")
    add("--cache", type=Path, default=ROOT / "build/paper", help="folder for what has been run")
    add("--page", type=Path, default=ROOT / "docs/paper.md", help="file of the page")
    args = parser.parse_args(argv)
    usual = ROOT.parent / "shared/traces"
    return Options(
        seeds=tuple(args.seeds[:1] if args.quick else args.seeds),
        requests=40 if args.quick else args.requests,
        jobs=args.jobs,
        quick=args.quick,
        traces=args.traces or (usual if usual.is_dir() else None),
        results=args.results,
        figures=args.figures,
        cache=args.cache,
        page=args.page,
    )
