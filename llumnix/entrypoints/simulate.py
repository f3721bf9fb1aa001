"""llumnix-sim: run a workload on a simulated cluster, in virtual time, and show what came of it.

It needs no vLLM and no etcd, and starts none.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llumnix.simulator import plots, record
from llumnix.simulator.config import SimConfig, check_seeds, read_config
from llumnix.simulator.run import simulate
from llumnix.simulator.schema import SimConfigError
from llumnix.simulator.summary import summarize, table

FAILED = 1  # exit code: something could not be done
WRONG = 2  # exit code, as argparse has it: what was given makes no sense
INTERRUPTED = 130  # exit code, as shells have it

Progress = Callable[[int], None]  # is told how many more requests have ended


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "plot":
            _plot(options.results, options.out)
        else:
            _run(options)
    except SimConfigError as error:
        return _told(str(error), WRONG)
    except plots.PlotsMissing as error:
        return _told(str(error), FAILED)
    except OSError as error:
        return _told(f"{error.filename or 'a file'}: {error.strerror}", FAILED)
    except KeyboardInterrupt:
        return _told("interrupted", INTERRUPTED)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("llumnix-sim", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="simulate what a configuration file says")
    run.add_argument("config", type=Path, metavar="CONFIG.yaml", help="see docs/simulator.md")
    run.add_argument("--out", type=Path, metavar="DIR", help="write records and figures there")
    run.add_argument("--seed", type=int, nargs="+", help="instead of those of the configuration")
    run.add_argument("--gzip", action="store_true", help="compress the records")
    run.add_argument("--no-plots", action="store_true", help="draw no figures")
    run.add_argument("--quiet", action="store_true", help="show no progress")
    plot = commands.add_parser("plot", help="draw figures of records, together in the same axes")
    plot.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    plot.add_argument("--out", type=Path, metavar="DIR", required=True)
    return parser


def _run(options: argparse.Namespace) -> None:
    """Run each seed; print its table, and write its record as soon as it is there."""
    config = read_config(options.config)
    seeds = tuple(options.seed or config.seeds)
    try:
        check_seeds(seeds)
    except ValueError as error:
        raise SimConfigError(str(error)) from error
    draws = options.out is not None and not options.no_plots
    if draws:
        plots.check_plots()  # now, and not after hours
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    name, ending = options.config.stem, ".json.gz" if options.gzip else ".json"
    written = []
    for seed in seeds:
        encoded = _simulate(config, seed, options.quiet)
        if options.out is not None:
            written.append(options.out / f"{name}-{seed}{ending}")
            record.write(written[-1], encoded)
    if draws:
        labels = [f"seed {seed}" for seed in seeds]
        records = dict(zip(labels, map(record.read, written), strict=True))
        plots.save_plots(records, options.out, prefix=f"{name}-")


def _simulate(config: SimConfig, seed: int, quiet: bool) -> bytes:
    """Run one seed and print its table; the record."""
    jobs, too_long = config.requests(seed)
    with _progress(len(jobs), f"seed {seed}", quiet) as progress:
        result = simulate(config.cluster, jobs, progress, seed)
    summary = summarize(result)
    print(f"seed {seed}: {len(jobs)} requests, {too_long} of them too long ", end="")
    print(f"({config.workload.too_long})\n{table(summary)}\n")
    return record.encode(
        result,
        summary,
        config=config.given,
        seed=seed,
        too_long=too_long,
        tokens=config.tokens,
    )


@contextmanager
def _progress(total: int, label: str, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr, if somebody looks and tqdm is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        quiet = True
    if quiet:
        yield lambda more: None
        return
    with tqdm(total=total, desc=label, unit=" requests", disable=None, leave=False) as bar:
        yield bar.update


def _plot(results: Sequence[Path], folder: Path) -> None:
    plots.check_plots()
    names = [path.name.partition(".json")[0] for path in results]
    if len(set(names)) < len(names):  # from several folders
        names = [str(path) for path in results]
    records = dict(zip(names, map(record.read, results), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    for path in plots.save_plots(records, folder):
        print(path)


def _told(sentence: str, code: int) -> int:
    print(f"llumnix-sim: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
