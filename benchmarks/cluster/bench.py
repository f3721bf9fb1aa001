"""One measured run: warm up, offer the load, and ask the servers before and after."""

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from benchmarks.cluster import scrape
from benchmarks.cluster.deployment import Deployment
from benchmarks.cluster.figures import figures, samples, waits
from benchmarks.cluster.knee import Probe, held
from benchmarks.cluster.load import Clients
from benchmarks.cluster.watch import Watch
from benchmarks.cluster.workload import Planned, Shape

_WARM_SEED = 1_000_000  # added to a run's: nothing of a warm-up is asked again
_WARM_OUTPUT = 32


class Cell(NamedTuple):
    """What is offered in one run."""

    shape: Shape
    cv: float
    rate: float  # infinite: all at once
    seed: int
    number: int  # of requests

    def __str__(self) -> str:
        rate = "all at once" if self.rate == float("inf") else f"{self.rate:g}/s"
        cv = "" if self.cv == 1 else f" CV {self.cv:g}"
        return f"{self.shape.label}{cv} {rate} seed {self.seed}"


@dataclass(frozen=True)
class Bench:
    """How runs are made."""

    clients: Clients
    model: str  # as requests name it
    longest: int  # tokens of a request
    instances: int
    warmup: float  # seconds
    drain: float  # seconds for the last requests to end
    watch: float = 0.0  # seconds between two looks at the engines; 0: none

    def run(self, deployment: Deployment, system: str, cell: Cell) -> dict[str, Any]:
        """Everything about one run."""
        self._warm_up(deployment, cell)
        deployment.wait_idle()
        requests = self._requests(cell)
        until = requests[-1].at + self.drain
        before, cpu = deployment.scrape(), deployment.cpu_seconds()
        began = time.time()
        with Watch(deployment.scrape_each, self.watch) as watch:
            rows = self.clients.offer(deployment.url, self.model, requests, cell.seed, until)
        took = time.time() - began
        cpu = deployment.cpu_seconds() - cpu
        deployment.wait_idle()
        return {
            "id": f"{system} {cell} {began:.3f}",
            "system": system,
            "shape": cell.shape.label,
            "cv": cell.cv,
            "rate": None if cell.rate == float("inf") else cell.rate,
            "seed": cell.seed,
            "took": round(took, 2),
            "drain": round(self.drain, 1),
            "server_cpu_seconds": round(cpu, 2),
            "figures": figures(rows, requests, until),
            "server": scrape.changes(before, deployment.scrape()),
            "watch": watch.seen(),
            "samples": samples(rows, requests),
        }

    def probe(self, deployment: Deployment, cell: Cell, bound: float) -> Probe:
        """A run that is broken off a little after its last request."""
        requests = self._requests(cell)
        until = requests[-1].at + bound
        rows = self.clients.offer(deployment.url, self.model, requests, cell.seed, until)
        deployment.wait_idle()
        failed = sum(bool(row.error) and row.error != "unfinished" for row in rows)
        found = figures(rows, requests, until)
        return Probe(
            cell.rate, held(waits(rows, requests, until), failed, bound), found["ttft"]["p99"]
        )

    def _requests(self, cell: Cell) -> list[Planned]:
        return cell.shape.requests(cell.rate, cell.cv, cell.number, cell.seed, self.longest)

    def _warm_up(self, deployment: Deployment, cell: Cell) -> None:
        if self.warmup <= 0:
            return
        rate = 2.0 * self.instances
        count = max(round(rate * self.warmup), 2)
        warm = cell._replace(cv=1.0, rate=rate, seed=cell.seed + _WARM_SEED, number=count)
        requests = [
            one._replace(output=min(one.output, _WARM_OUTPUT)) for one in self._requests(warm)
        ]
        until = requests[-1].at + 4 * self.warmup
        self.clients.offer(deployment.url, self.model, requests, warm.seed, until)

    def bounded(self, seconds: float) -> "Bench":
        """The same with a drain that is no longer than this."""
        return replace(self, drain=min(self.drain, max(seconds, 1.0)))
