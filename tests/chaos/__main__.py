"""make chaos: faults, one after the other and then at random, under a load whose answers are known.

    python -m tests.chaos --minutes 60 --seed 7
    python -m tests.chaos --minutes 5 --engine sim
    python -m tests.chaos --minutes 0 --only "engine SIGKILL" "link cut"

Exit status 1 if a token was lost, doubled or wrong, a request failed that should not have, or
something was left over.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.chaos.cluster import PASSWORD, Arena
from tests.chaos.fault import Fault
from tests.chaos.faults import FAULTS
from tests.chaos.load import Load
from tests.chaos.report import Report
from tests.chaos.run import Run, table_path
from tests.kit.etcd import EtcdCluster
from tests.kit.proxy import Proxies

LONG = 30.0  # minutes
MODEL = "llumnix/models/SmolLM2-135M-Instruct"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of random faults and all")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--engine", choices=("vllm", "sim"), default="vllm")
    parser.add_argument("--instances", type=int, default=2, help="of each node")
    parser.add_argument("--clients", type=int, default=12, help="requests at a time")
    parser.add_argument("--moves", type=float, default=1.0, help="seconds between moves by hand")
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="of " + ", ".join(_names()))
    parser.add_argument("--json", type=Path, default=Path("build/chaos"), help="file or folder")
    return parser.parse_args()


def _longer(fault: Fault) -> Fault:
    """In a long run, two minutes without a quorum."""
    return replace(fault, hold=120.0) if fault.name == "etcd quorum lost" else fault


def _names() -> list[str]:
    return [fault.name for fault in FAULTS]


def main() -> int:
    """Run it all; the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    args = _arguments()
    faults = [f for f in FAULTS if f.name in (args.only or _names())]
    if args.engine == "sim":  # which has no processes of its own to kill
        faults = [f for f in faults if not f.name.startswith("engine")]
    if unknown := set(args.only or ()) - set(_names()):
        print(f"unknown faults: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    model = Path(os.environ.get("LLUMNIX_TEST_MODEL") or cache / MODEL)
    until = time.monotonic() + 60 * args.minutes
    folder = Path(tempfile.mkdtemp(prefix="llumnix-chaos-"))
    path = args.json if args.json.suffix else table_path(args.json, args.seed)
    report = Report(path, {k: str(v) for k, v in vars(args).items()} | {"logs": str(folder)})
    print(f"seed {args.seed}, logs in {folder}, report in {path}", flush=True)
    with EtcdCluster(3, PASSWORD) as etcd, Proxies(args.seed) as proxies:
        arena = Arena(folder, str(model), etcd, proxies, args.instances, args.engine)
        try:
            urls = arena.urls()
            load = Load(urls, model, args.clients, args.seed, args.moves)
            run = Run(arena, load, report, args.seed, lambda text: print(text, flush=True))
            run.begin(10.0)
            run.all_once([_longer(f) if args.minutes >= LONG else f for f in faults])
            run.at_random(faults, until)
            run.end()
        except BaseException as error:
            report.wrongs.append(f"the run was cut off: {error!r}")
            raise
        finally:
            report.write()
            arena.close()
    print(report.table())
    for wrong in report.wrongs:
        print(f"! {wrong}")
    print("all is well" if report.good else "NOT all is as it should be")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
