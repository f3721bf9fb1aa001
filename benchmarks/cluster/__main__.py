"""Start the systems one after the other, offer each the same requests, and report.

Everything goes into one folder: results.json (all that was seen, rewritten after each run),
table.md, latency.png (if matplotlib is there) and log.txt.
"""

import argparse
import signal
import sys
from dataclasses import replace
from typing import NoReturn

from benchmarks.cluster.bench import Bench
from benchmarks.cluster.budget import Budget
from benchmarks.cluster.campaign import Campaign, KneeRule
from benchmarks.cluster.cost import Cost
from benchmarks.cluster.engines import Engines
from benchmarks.cluster.facts import facts
from benchmarks.cluster.load import Clients
from benchmarks.cluster.options import engines_of, parser, systems_of, workloads_of
from benchmarks.cluster.plot import draw
from benchmarks.cluster.progress import Progress
from benchmarks.cluster.results import Results, merge
from benchmarks.cluster.table import report


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser()
    args = options.parse_args(argv)
    budget = Budget(args.budget)
    try:
        engines, systems, workloads = engines_of(args), systems_of(args), workloads_of(args)
    except ValueError as error:
        options.error(str(error))
    if args.cost:
        engines = replace(engines, instances=1)
    results = Results(args.out / "results.json", facts(engines, argv))
    progress = Progress(args.out / "log.txt")
    progress.note(results.data["command"])
    try:
        with Clients(args.clients) as clients:
            bench = Bench(
                clients=clients,
                model=engines.served,
                longest=engines.longest,
                instances=engines.instances,
                warmup=args.warmup,
                drain=args.drain,
                watch=args.watch,
            )
            if args.cost:
                _cost(args, bench, engines, budget, results, progress).run()
            else:
                Campaign(
                    bench=bench,
                    engines=engines,
                    systems=systems,
                    workloads=workloads,
                    rates=args.rates or (),
                    seeds=args.seeds,
                    seconds=args.seconds,
                    start_timeout=args.start_timeout,
                    restart=args.restart,
                    rule=KneeRule(args.probe_seconds, args.knee_ttft, args.probes, args.around),
                    budget=budget,
                    results=results,
                    progress=progress,
                ).run()
    finally:
        progress.close()
        _finish(args, results)


def _cost(
    args: argparse.Namespace,
    bench: Bench,
    engines: Engines,
    budget: Budget,
    results: Results,
    progress: Progress,
) -> Cost:
    return Cost(
        bench=bench,
        engines=engines,
        shape=workloads_of(args)[0][0],
        rate=(args.rates or [2.0])[0],
        burst=args.burst,
        rounds=args.cost_rounds,
        seconds=args.seconds,
        start_timeout=args.start_timeout,
        budget=budget,
        results=results,
        progress=progress,
    )


def _finish(args: argparse.Namespace, results: Results) -> None:
    results.write()
    merged = merge([results.data])
    text = report(merged, args.base)
    (args.out / "table.md").write_text(text)
    print(text, flush=True)
    draw(merged, args.out / "latency.png")


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # so that servers are ended and results written
    main()
