"""Whether many dispatchers that decide at once all run to the same instances.

Each of `--dispatchers` gets its share of Poisson arrivals and decides by the reports of all
instances (each node's five times a second, seen a little later) and by what it has sent itself. A
request holds KV blocks for a while, or waits for them. Time is virtual, the policies are real.

    python benchmarks/herd.py --dispatchers 1 64

Shown is how unevenly the instances are loaded (the standard deviation of their requests over the
mean, and the fullest one over the mean), how many requests had to wait for blocks, and how long a
decision took on this machine.
"""

import argparse
import heapq
import itertools
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.plugins import POLICIES
from llumnix.policy.dispatch import Request
from llumnix.policy.dispatch_state import DispatchState

BLOCKS = 851  # KV blocks of an instance
REPORT = 0.2  # seconds between two reports of a node
DELAY = 0.01  # seconds until all have seen one
HELD = 10.0  # seconds for which a request runs, in the mean
ASKED = 20.0  # KV blocks that it holds, in the mean
WARM = 2 * HELD  # seconds until what is seen counts


@dataclass
class Instance:
    """An engine that runs what it has blocks for, in the order in which it came."""

    name: str
    used: int = 0
    running: int = 0
    queue: list[tuple[int, float]] = field(default_factory=list)  # blocks, and seconds
    received: dict[str, int] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        return self.running + len(self.queue)

    def load(self) -> InstanceLoad:
        waiting = sum(blocks for blocks, _ in self.queue)
        head = self.queue[0][0] if self.queue else 0
        return InstanceLoad(
            self.name,
            running=self.running,
            waiting=len(self.queue),
            used_blocks=self.used,
            waiting_blocks=waiting,
            head_blocks=head,
            received=dict(self.received),
        )


class Herd:
    """One run."""

    def __init__(self, args: argparse.Namespace, dispatchers: int, top_k: int, seed: int) -> None:
        self.rng = Random(seed)
        self.instances = {f"i{n}": Instance(f"i{n}") for n in range(args.instances)}
        node = {f"i{n}": f"n{n // args.node_size}" for n in range(args.instances)}
        infos = {
            i: InstanceInfo(i, node[i], "m", InstanceState.READY, BLOCKS, 16)
            for i in self.instances
        }
        self.nodes = {f"d{n}": NodeInfo(f"d{n}", "d:1", "", 1) for n in range(dispatchers)}
        loads = {i: InstanceLoad(i) for i in infos}
        self.view = ClusterView(nodes=self.nodes, instances=infos, loads=loads)
        self.groups = [[i for i in infos if node[i] == n] for n in dict.fromkeys(node.values())]
        policy = POLICIES[args.policy]
        self.boards = [
            DispatchState(f"d{n}", policy, top_k, Random(self.rng.random()))
            for n in range(dispatchers)
        ]
        for board in self.boards:
            board.update_view(self.view)
        self.rate = args.load * args.instances * BLOCKS / ASKED / HELD
        self.events: list[tuple[float, int, str, object]] = []
        self.order = itertools.count()
        self.waited = self.arrived = 0
        self.took: list[float] = []
        self.spread: list[float] = []
        self.fullest: list[float] = []

    def at(self, when: float, what: str, about: object = None) -> None:
        heapq.heappush(self.events, (when, next(self.order), what, about))

    def run(self, seconds: float) -> None:
        self.at(self.rng.expovariate(self.rate), "arrive")
        for group in self.groups:
            self.at(self.rng.random() * REPORT, "report", group)
        self.at(WARM, "look")
        while (event := heapq.heappop(self.events))[0] < WARM + seconds:
            now, _, what, about = event
            getattr(self, f"_{what}")(now, about)

    def _arrive(self, now: float, _: object) -> None:
        self.at(now + self.rng.expovariate(self.rate), "arrive")
        board = self.rng.choice(self.boards)
        blocks = 1 + int(self.rng.expovariate(1 / ASKED))
        began = time.perf_counter()
        name = board.decide(Request(blocks * 16, blocks, 0))
        assert name is not None
        sequence = board.sent(name, blocks, blocks * 16)
        if now > WARM:
            self.took.append(time.perf_counter() - began)
        instance = self.instances[name]
        instance.received[board._node] = sequence
        instance.queue.append((blocks, self.rng.expovariate(1 / HELD)))
        self._admit(now, instance)
        if now > WARM:
            self.arrived += 1
            self.waited += bool(instance.queue)

    def _admit(self, now: float, instance: Instance) -> None:
        while instance.queue and instance.used + instance.queue[0][0] <= BLOCKS:
            blocks, seconds = instance.queue.pop(0)
            instance.used += blocks
            instance.running += 1
            self.at(now + seconds, "end", (instance, blocks))

    def _end(self, now: float, about: object) -> None:
        instance, blocks = about  # type: ignore[misc]
        instance.used -= blocks
        instance.running -= 1
        self._admit(now, instance)

    def _report(self, now: float, group: object) -> None:
        self.at(now + REPORT, "report", group)
        loads = {i: self.instances[i].load() for i in group}  # type: ignore[attr-defined]
        self.at(now + DELAY, "see", loads)

    def _see(self, now: float, loads: object) -> None:
        self.view = ClusterView(
            nodes=self.nodes,
            instances=self.view.instances,
            loads={**self.view.loads, **loads},  # type: ignore[dict-item]
        )
        for board in self.boards:
            board.update_view(self.view)

    def _look(self, now: float, _: object) -> None:
        self.at(now + 0.1, "look")
        counts = [instance.requests for instance in self.instances.values()]
        mean = statistics.mean(counts)
        self.spread.append(statistics.pstdev(counts) / mean)
        self.fullest.append(max(counts) / mean)


def main() -> None:
    """Run each number of dispatchers with each number of choices; a table, and JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=256)
    parser.add_argument("--node-size", type=int, default=4, help="instances of a node")
    parser.add_argument("--dispatchers", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--top-k", type=int, nargs="+", default=[1])
    parser.add_argument("--policy", choices=sorted(POLICIES), default="load")
    parser.add_argument("--load", type=float, default=0.8, help="share of all KV blocks in use")
    parser.add_argument("--seconds", type=float, default=20.0, help="of virtual time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(
        "| dispatchers | top-k | deviation / mean | fullest / mean | waited, % | decision p99, µs |"
    )
    print("|---|---|---|---|---|---|")
    for dispatchers, top_k in itertools.product(args.dispatchers, args.top_k):
        herd = Herd(args, dispatchers, top_k, args.seed)
        herd.run(args.seconds)
        p99 = statistics.quantiles(herd.took, n=100)[98] * 1e6
        row = {
            "dispatchers": dispatchers,
            "top_k": top_k,
            "deviation": statistics.mean(herd.spread),
            "fullest": statistics.mean(herd.fullest),
            "waited": herd.waited / herd.arrived,
            "decision_p99_us": p99,
        }
        rows.append(row)
        print(
            f"| {dispatchers} | {top_k} | {row['deviation']:.3f} | {row['fullest']:.2f} | "
            f"{100 * row['waited']:.2f} | {p99:.0f} |",
            flush=True,
        )
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
