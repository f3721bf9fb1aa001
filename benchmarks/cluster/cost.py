"""What llumnix costs where nothing is to be gained: one instance, beside `vllm serve`, in turn."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.cluster.bench import Bench, Cell
from benchmarks.cluster.budget import Budget
from benchmarks.cluster.campaign import told
from benchmarks.cluster.deployment import Deployment
from benchmarks.cluster.engines import Engines
from benchmarks.cluster.figures import percentile
from benchmarks.cluster.progress import Progress
from benchmarks.cluster.results import Results, Run
from benchmarks.cluster.systems import KNOWN, Absent, layout
from benchmarks.cluster.workload import Shape

SYSTEMS = ("vllm", "llumnix")
FULL = float("inf")  # the rate of a burst
QUANTITIES = ("ttft", "tpot", "e2e")


@dataclass
class Cost:
    """Both servers are up on the same GPU, and take the same requests one after the other."""

    bench: Bench
    engines: Engines
    shape: Shape
    rate: float
    burst: int  # requests that come at once, for the throughput
    rounds: int
    seconds: float
    start_timeout: float
    budget: Budget
    results: Results
    progress: Progress

    def run(self) -> None:
        """Until all rounds are done or the time is over."""
        memory = self.engines.share() / len(SYSTEMS) if self.engines.gpus else None
        engines = replace(self.engines, memory=memory)
        self.progress.expect(2 * len(SYSTEMS) * self.rounds)
        deployments: dict[str, Deployment] = {}
        with ExitStack() as stack:
            for name in SYSTEMS:
                found = layout(KNOWN[name], engines)
                assert not isinstance(found, Absent)
                deployments[name] = Deployment(found, self.start_timeout)
                stack.enter_context(deployments[name])
                self.progress.say(f"{name}: up after {deployments[name].started_in:.0f} s")
            self._rounds(deployments)
        for deployment in deployments.values():
            for line in deployment.report:
                self.progress.note(f"  log of {line}")
        self.results.data["cost"] = ratios(self.results.data["runs"])
        self.results.write()

    def _rounds(self, deployments: dict[str, Deployment]) -> None:
        took = 0.0  # by the longest round
        for number in range(self.rounds):
            left = self.budget.left - 15.0  # the servers' end
            if left < took or left <= 0:
                self.results.skip(f"Rounds {number + 1} to {self.rounds}: the time was over.")
                return
            began = time.monotonic()
            # Who is first in one round is last in the next.
            order = SYSTEMS if number % 2 == 0 else SYSTEMS[::-1]
            for rate, count in ((self.rate, round(self.rate * self.seconds)), (FULL, self.burst)):
                for name in order:
                    cell = Cell(self.shape, 1.0, rate, number + 1, max(count, 1))
                    run = self.bench.bounded(left).run(deployments[name], name, cell)
                    self.results.add({**run, "cost": True})
                    self.progress.say(told(run))
                    self.progress.step()
            took = max(took, time.monotonic() - began)


def ratios(runs: Sequence[Run]) -> dict[str, Any]:
    """llumnix over vLLM: of all requests under light load, and of the throughput of the bursts."""
    light = {name: _light(runs, name) for name in SYSTEMS}
    full = {name: [_throughput(run) for run in _of(runs, name, True)] for name in SYSTEMS}
    if not all(full.values()):
        return {}
    pairs = [ours / theirs for ours, theirs in zip(full["llumnix"], full["vllm"], strict=False)]
    found: dict[str, Any] = {"rounds": len(pairs)}
    found["burst_throughput"] = _spread(pairs)
    served = {name: [_throughput(run) for run in _of(runs, name, False)] for name in SYSTEMS}
    found["light_throughput"] = _spread(
        [ours / theirs for ours, theirs in zip(served["llumnix"], served["vllm"], strict=False)]
    )
    for quantity in QUANTITIES:
        ours, theirs = (light[name][quantity] for name in ("llumnix", "vllm"))
        found[quantity] = {
            "mean": statistics.fmean(ours) / statistics.fmean(theirs),
            **{f"p{p}": percentile(ours, p) / percentile(theirs, p) for p in (50, 99)},
        }
    cpu = {
        name: sum(run["server_cpu_seconds"] for run in runs if run["system"] == name)
        for name in SYSTEMS
    }
    if cpu["vllm"]:
        found["server_cpu"] = cpu["llumnix"] / cpu["vllm"]
    return found


def _of(runs: Sequence[Run], system: str, burst: bool) -> list[Run]:
    return [r for r in runs if r["system"] == system and (r["rate"] is None) == burst]


def _light(runs: Sequence[Run], system: str) -> dict[str, list[float]]:
    return {
        quantity: [
            value
            for run in _of(runs, system, False)
            for value in run["samples"][quantity]
            if value is not None
        ]
        for quantity in QUANTITIES
    }


def _throughput(run: Run) -> float:
    return float(run["figures"]["tokens_per_second"])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
