"""All runs of a comparison: every system in turn, each with the same requests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.cluster.bench import Bench, Cell
from benchmarks.cluster.budget import Budget
from benchmarks.cluster.deployment import Deployment
from benchmarks.cluster.engines import Engines
from benchmarks.cluster.knee import Knee, Probe, around, search
from benchmarks.cluster.load import ClientError
from benchmarks.cluster.process import StartError
from benchmarks.cluster.progress import Progress
from benchmarks.cluster.results import Results, Run
from benchmarks.cluster.systems import Absent, System, layout
from benchmarks.cluster.workload import Shape

_STOP_SECONDS = 15.0  # to end a server
_PROBE_SEED = 999


@dataclass(frozen=True)
class KneeRule:
    """How the knee is looked for."""

    seconds: float  # of a probe
    bound: float  # seconds within which 99 % of the first tokens must come
    most: int  # probes
    around: Sequence[float]  # shares of it that are measured


@dataclass
class Campaign:
    """What is compared, and where its results go."""

    bench: Bench
    engines: Engines
    systems: Sequence[System]  # the first one is asked for the knee
    workloads: Sequence[tuple[Shape, float]]  # with the CV of the gaps
    rates: Sequence[float]  # none: around the knee
    seeds: Sequence[int]
    seconds: float
    start_timeout: float
    restart: bool  # each system anew for each seed
    rule: KneeRule
    budget: Budget
    results: Results
    progress: Progress
    _knees: dict[tuple[Shape, float], list[float]] = field(default_factory=dict)
    _starting: float = 90.0  # seconds, until one is known
    _draining: dict[float, float] = field(default_factory=dict)  # seconds beyond, by rate

    def run(self) -> None:
        """Until all is done or the time is over."""
        turns = [[seed] for seed in self.seeds] if self.restart else [list(self.seeds)]
        shares = 3 if not self.rates else len(self.rates)
        runs = len(self.systems) * len(self.workloads) * shares * len(self.seeds)
        self.progress.expect(runs)
        parts = len(turns) * len(self.systems)
        for seeds in turns:
            for system in self.systems:
                self._system(system, seeds, parts)
                parts -= 1

    def _system(self, system: System, seeds: Sequence[int], parts: int) -> None:
        found = layout(system, self.engines)
        if isinstance(found, Absent):
            return self._skip(f"{system.name}: {found.reason}.")
        probes = 0.0 if self.rates or self._knees else self.rule.most * (self.rule.seconds + 5)
        # Probes serve all systems, and are not taken off the share of the one that is asked.
        share = Budget(None)
        if self.budget.left != float("inf"):
            share = Budget(probes + (self.budget.left - probes) / parts)
        if share.left < self._starting + self.seconds + _STOP_SECONDS:
            return self._skip(f"{system.name}, seeds {seeds}: the time was over.")
        timeout = min(self.start_timeout, share.left)
        deployment = Deployment(found, timeout)
        self.progress.say(f"{system.name}: starting")
        try:
            with deployment:
                self._starting = deployment.started_in
                self.progress.say(f"{system.name}: up after {deployment.started_in:.0f} s")
                self._measure(deployment, system, seeds, share)
        except (StartError, ClientError) as error:
            self._skip(f"{system.name}, seeds {seeds}: {error}")
        for line in deployment.report:
            self.progress.note(f"  log of {line}")

    def _measure(
        self, deployment: Deployment, system: System, seeds: Sequence[int], share: Budget
    ) -> None:
        for workload in self.workloads:
            if not self.rates and workload not in self._knees:
                self._knees[workload] = self._find_knee(deployment, *workload)
        for cell in self._cells(seeds):
            drain = share.left - 2 * self.bench.warmup - self.seconds - _STOP_SECONDS
            known = max(self._draining.values(), default=5.0)
            if drain < self._draining.get(cell.rate, known):
                self._skip(f"{system.name}, {cell}: the time was over.")
                continue
            run = self.bench.bounded(drain).run(deployment, system.name, cell)
            beyond = run["took"] - self.seconds
            self._draining[cell.rate] = max(beyond, self._draining.get(cell.rate, 0.0))
            run["started_in"] = round(deployment.started_in, 1)
            self.results.add(run)
            self.progress.say(told(run))
            self.progress.step()

    def _cells(self, seeds: Sequence[int]) -> Iterator[Cell]:
        for seed in seeds:
            for shape, cv in self.workloads:
                for rate in self.rates or self._knees[shape, cv]:
                    yield Cell(shape, cv, rate, seed, max(round(rate * self.seconds), 1))

    def _find_knee(self, deployment: Deployment, shape: Shape, cv: float) -> list[float]:
        rule = self.rule

        def probe(rate: float) -> Probe:
            count = max(round(rate * rule.seconds), 1)
            cell = Cell(shape, cv, rate, _PROBE_SEED, count)
            found = self.bench.probe(deployment, cell, rule.bound)
            word = "held" if found.held else "not held"
            self.progress.say(f"probe {cell}: P99 TTFT {found.p99 * 1e3:,.0f} ms, {word}")
            return found

        knee: Knee = search(probe, 2.0 * self.engines.instances, most=rule.most)
        rates = around(knee.rate, rule.around)
        self.progress.say(f"the knee of {shape.label} is at {knee.rate:.3g}/s; measured: {rates}")
        self.results.data["knees"].append(
            {"shape": shape.label, "cv": cv, "rate": knee.rate, "beyond": knee.beyond}
            | {"probes": [probe._asdict() for probe in knee.probes], "bound": rule.bound}
        )
        return rates

    def _skip(self, sentence: str) -> None:
        self.results.skip(sentence)
        self.progress.say(sentence)


def told(run: Run) -> str:
    """A run in one line."""
    found, server = run["figures"], run["server"]
    ttft, tpot, gap = (found[name] for name in ("ttft", "tpot", "gap"))
    parts = [run["id"].rsplit(" ", 1)[0] + ":"]
    if ttft:
        parts.append("TTFT {mean:,.0f} / {p99:,.0f} ms,".format(**_ms(ttft)))
    if tpot:
        parts.append("TPOT {mean:.1f} / {p99:.1f} ms,".format(**_ms(tpot)))
    if gap:
        parts.append("gap {mean:,.0f} / {p99:,.0f} ms,".format(**_ms(gap)))
    parts.append(f"{found['tokens_per_second']:,.0f} tokens/s,")
    parts.append(f"{found['failed']} failed, {found['unfinished']} unfinished,")
    parts.append(f"{server['preemptions']} preempted, moves {server['moves']}")
    return " ".join(parts)


def _ms(spread: dict[str, float]) -> dict[str, float]:
    return {name: value * 1e3 for name, value in spread.items()}
