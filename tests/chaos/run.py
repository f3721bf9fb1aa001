"""A run: each fault once, then random ones until the time is up, and a look at what is left."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.chaos.cluster import NAMES, PREFIX, START, Arena, later
from tests.chaos.fault import Fault
from tests.chaos.load import Load
from tests.chaos.mob import Mob
from tests.chaos.report import Injection, Report, measure

SETTLE = 2.0  # seconds without a fault before the next
CALM = 45.0  # seconds for all streams to go on after a fault
END = 60.0  # seconds for the last requests
MARGIN = 8  # descriptors, or threads, that a node opens when it first needs them, and keeps

Say = Callable[[str], None]


class Run:
    """Injects faults into a cluster under load, and keeps the report."""

    def __init__(self, arena: Arena, load: Load, report: Report, seed: int, say: Say) -> None:
        self.arena, self.load, self.report = arena, load, report
        self.mob = Mob(arena.urls(), seed)
        self._draw = random.Random(seed)
        self._say = say
        self._tracebacks: dict[str, int] = {}
        # By process, under load and whole: what a node had open when it was first seen so.
        self._open: dict[int, tuple[int, int]] = {}

    def begin(self, quiet: float) -> None:
        """Start the nodes and the load; nothing is done to them for a while."""
        for name in NAMES:
            self.arena.start(name)
        if missing := self.arena.whole(START):
            raise RuntimeError(f"the cluster did not start: {missing}")
        self.arena.remember()
        self.load.start()
        self.mob.start()
        began = time.time()
        time.sleep(quiet)
        self._look()
        gaps = [b - a for r in self.load.since(began) for a, b in r.gaps(began, time.time())]
        self.report.quiet_gap = max(gaps, default=0.0)

    def all_once(self, faults: Sequence[Fault]) -> None:
        """One after the other."""
        for fault in faults:
            self.one(fault)

    def at_random(self, faults: Sequence[Fault], until: float) -> None:
        """As many as there is time for, on the monotonic clock."""
        while time.monotonic() < until:
            self.one(self._draw.choices(faults, [f.weight for f in faults])[0])

    def one(self, fault: Fault) -> Injection:
        """Inject one, heal it, and wait until all is well; nothing that happens raises."""
        injection = Injection(fault.name, "", time.time())
        try:
            self._carry_out(fault, injection)
        except Exception as error:  # the rest of the run has to go on
            injection.wrongs.append(f"could not be carried out: {error!r}")
            if self.arena.whole(fault.within):
                self.arena.mend()
                self.arena.whole(START)
        self.report.injections.append(injection)
        self._count()
        self.report.write()
        self._progress(injection)
        return injection

    def _carry_out(self, fault: Fault, injection: Injection) -> None:
        # Clients leave first; what counts begins with the deed.
        deed = fault.inject(self.arena, self.load, self._draw)
        injection.target = deed.what
        if deed.at:
            injection.at = deed.at
        time.sleep(fault.hold)
        healed = injection.at  # what nobody heals has to heal by itself
        if deed.heal is not None:
            healed = time.time()
            deed.heal()
        missing = self.arena.whole(fault.within)
        injection.recover = time.time() - healed
        if missing:
            injection.wrongs.append(f"not whole {fault.within:.0f} s after the heal: {missing}")
            self.arena.mend()
            if still := self.arena.whole(START):
                injection.wrongs.append(f"nor after it was mended by force: {still}")
        self.load.avoid = frozenset()
        self._calm(injection)
        self._look()
        self.arena.remember()
        injection.ended = time.time()
        measure(injection, self.arena, self.load, fault.detects, deed.homes)
        self._forget(injection)

    def _calm(self, injection: Injection) -> None:
        """Wait until each stream that was under way has ended or goes on."""
        healed = time.time()

        def on() -> bool:
            return all(
                (r.times and r.times[-1] > healed) or r.began > healed for r in list(self.load.open)
            )

        if not later(on, CALM):
            stuck = [r for r in list(self.load.open) if not r.times or r.times[-1] <= healed]
            for request in stuck:
                at = f"at token {request.verdict.position}, node {request.node}"
                injection.wrongs.append(f"request {request.id or '?'} hangs {at}")
        time.sleep(SETTLE)

    def _look(self) -> None:
        """Note what each new process of a node has open."""
        for node in self.arena.nodes.values():
            if node.process.exitcode is None and node.pid not in self._open:
                self._open[node.pid] = node.descriptors(), node.threads()

    def _grown(self) -> list[str]:
        """Which nodes have more open, now that they are idle, than they had under load."""
        found = []
        for name, node in self.arena.nodes.items():
            if node.process.exitcode is None and (first := self._open.get(node.pid)):
                now = node.descriptors(), node.threads()
                if any(b > a + MARGIN for a, b in zip(first, now, strict=True)):
                    found.append(f"node {name} had {first} descriptors and threads, and has {now}")
        return found

    def _forget(self, injection: Injection) -> None:
        """What has ended is in the books."""
        done = [r for r in list(self.load.ended) if r.judged]
        for request in done:
            self.load.ended.remove(request)
        self.report.requests += len(done)
        self.report.tokens += sum(r.verdict.position for r in done)

    def _count(self) -> None:
        self.report.moved, self.report.mob = dict(self.load.moved), dict(self.mob.counts)
        for wrongs in self.load.bugs, self.mob.wrongs:
            self.report.wrongs += wrongs
            wrongs.clear()
        for node, count in self.arena.tracebacks().items():
            if count > self._tracebacks.get(node, 0):
                self.report.wrongs.append(
                    f"node {node} logged {count - self._tracebacks.get(node, 0)} tracebacks "
                    f"during {self.report.injections[-1].fault}"
                )
            self._tracebacks[node] = count

    def _progress(self, i: Injection) -> None:
        detect = "-" if i.detect is None else f"{i.detect:.1f}"
        resume = "-" if i.resume is None else f"{i.resume:.1f}"
        self._say(
            f"{len(self.report.injections):3} {i.fault} ({i.target}): detect {detect} s, "
            f"resume {resume} s, gap {i.gap:.1f} s, whole again {i.recover:.1f} s, "
            f"{i.resumed} resumed, {i.failed} failed, {i.homeless} with their node, tokens "
            f"{i.lost} lost {i.doubled} doubled {i.wrong} wrong"
        )
        for wrong in i.wrongs:
            self._say(f"      ! {wrong}")

    # ---- the end ----

    def end(self) -> None:
        """Let the load end, and look at what is left of it."""
        last = Injection("the end", "", time.time())
        self.mob.stop()
        if not self.load.stop(END):
            last.wrongs.append(f"{len(self.load.open)} requests did not end in {END:.0f} s")
        last.ended = time.time()
        measure(last, self.arena, self.load, "", frozenset())
        self._forget(last)
        self.report.mob = dict(self.mob.counts)
        self.report.wrongs += last.wrongs + self.mob.wrongs
        self.report.wrongs += self.leftovers()
        self.report.write()

    def leftovers(self) -> list[str]:
        """What requests, migrations and nodes have left behind; ends the nodes."""
        found = []
        for name, node in self.arena.nodes.items():
            if not later(node.idle, 10.0):
                shown = {k: v for k, v in node.metrics().items() if v and _is_open(k)}
                found.append(f"node {name} still has {shown}")
        found += self._grown()
        for kind in ("migrations/", "c10d/"):
            if not later(lambda kind=kind: not self._keys(kind), 10.0):
                found.append(f"keys are left: {self._keys(kind)}")
        self.arena.remember()
        for name, node in self.arena.nodes.items():
            code = node.stop(60.0) if node.process.exitcode is None else node.process.exitcode
            if code:
                found.append(f"node {name} ended with status {code}")
        if not later(lambda: not self.arena.left(), 10.0):
            found.append(f"processes are left: {sorted(self.arena.left())}")
        left = [k for k in self._keys("") if k != f"{PREFIX}token"]
        if left:
            found.append(f"keys are left after the nodes: {left}")
        return found

    def _keys(self, kind: str) -> list[str]:
        return self.arena.etcd.ctl("get", "--prefix", "--keys-only", PREFIX + kind).split()


def _is_open(metric: str) -> bool:
    return metric.startswith(("llumnix_open_requests", "llumnix_instance_"))


def table_path(folder: Path, seed: int) -> Path:
    """Where the JSON file of a run goes."""
    return folder / f"chaos-{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}.json"
