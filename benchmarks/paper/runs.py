"""Simulated runs, in several processes; what has been run is kept until the code changes."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.paper.options import ROOT, Options
from benchmarks.paper.outcome import Outcome
from llumnix.simulator.cluster import ClusterConfig
from llumnix.simulator.run import simulate
from llumnix.simulator.workload import Workload, generate

# What a run depends on.
SOURCES = ("simulator", "policy", "engine/sim", "latency.py", "cluster.py")


class Run(NamedTuple):
    """One run: what it depends on, and nothing else."""

    cluster: ClusterConfig
    workload: Workload
    seed: int

    def key(self) -> str:
        """A name that another run, or other code, does not have."""
        digest = hashlib.sha256(f"{_version()} {self!r}".encode())
        if self.workload.trace:
            digest.update(Path(self.workload.trace.file).read_bytes())
        return digest.hexdigest()[:24]


@cache
def _version() -> str:
    digest = hashlib.sha256(Path(__file__).with_name("outcome.py").read_bytes())
    for source in SOURCES:
        path = ROOT / "llumnix" / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def run(one: Run, folder: Path) -> Outcome:
    """One run, or what is kept of it."""
    file = folder / f"{one.key()}.npz"
    if file.exists():
        return Outcome.load(file)
    jobs = generate(one.workload, one.seed).jobs
    outcome = Outcome.of(simulate(one.cluster, jobs, seed=one.seed))
    folder.mkdir(parents=True, exist_ok=True)
    outcome.save(file)
    return outcome


def run_all(runs: Sequence[Run], options: Options, what: str) -> list[Outcome]:
    """All runs, in their order."""
    with tqdm(total=len(runs), desc=what, unit="run", smoothing=0) as bar:
        if options.jobs == 1:
            found = []
            for one in runs:
                found.append(run(one, options.cache))
                bar.update()
            return found
        with ProcessPoolExecutor(options.jobs) as pool:
            futures = [pool.submit(run, one, options.cache) for one in runs]
            for _ in as_completed(futures):
                bar.update()
            return [future.result() for future in futures]
