"""How long a dispatch decision takes, by policy, while load reports come in between.

A decision is `decide` and `sent` together, as the dispatcher does them for each request. Every 20
decisions a node of 8 instances reports, which makes a new view of the cluster; taking that over
is timed apart. Times are wall-clock microseconds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from random import Random

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.plugins import POLICIES
from llumnix.policy.dispatch import Request
from llumnix.policy.dispatch_state import DispatchState

_NODE_SIZE = 8
_DECISIONS_PER_REPORT = 20


def _cluster(instances: int) -> ClusterView:
    infos = {
        f"i{n}": InstanceInfo(f"i{n}", f"n{n // _NODE_SIZE}", "model", InstanceState.READY, 851, 16)
        for n in range(instances)
    }
    return ClusterView(instances=infos, loads={i: InstanceLoad(i) for i in infos})


def _report(view: ClusterView, node: int, sequence: int, rng: Random) -> ClusterView:
    loads = dict(view.loads)
    first = node * _NODE_SIZE
    for n in range(first, min(first + _NODE_SIZE, len(view.instances))):
        running, waiting = rng.randrange(1, 40), rng.randrange(3)
        loads[f"i{n}"] = InstanceLoad(
            f"i{n}",
            running=running,
            waiting=waiting,
            used_blocks=rng.randrange(851),
            waiting_blocks=waiting * 20,
            received={"me": sequence},
        )
    return ClusterView(revision=view.revision + 1, instances=view.instances, loads=loads)


def _percentile(times: list[float], percent: int) -> float:
    return statistics.quantiles(times, n=100)[percent - 1] * 1e6


def measure(policy: str, instances: int, decisions: int, top_k: int) -> dict[str, float]:
    """p50 and p99 in microseconds of a decision, and of taking over a view."""
    rng = Random(1)
    board, view = DispatchState("me", POLICIES[policy], top_k, Random(2)), _cluster(instances)
    board.update_view(view)
    decided: list[float] = []
    updated: list[float] = []
    sequence = 0
    for n in range(decisions):
        if n % _DECISIONS_PER_REPORT == 0:
            nodes = -(-instances // _NODE_SIZE)
            view = _report(view, rng.randrange(nodes), sequence, rng)
            start = time.perf_counter()
            board.update_view(view)
            updated.append(time.perf_counter() - start)
        blocks = rng.randrange(1, 60)
        start = time.perf_counter()
        instance = board.decide(Request(blocks=blocks))
        assert instance is not None
        sequence = board.sent(instance, blocks, blocks * 16)
        decided.append(time.perf_counter() - start)
    return {
        "decision_p50_us": round(_percentile(decided, 50), 1),
        "decision_p99_us": round(_percentile(decided, 99), 1),
        "view_p50_us": round(_percentile(updated, 50), 1),
        "view_p99_us": round(_percentile(updated, 99), 1),
    }


def main() -> None:
    """Print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--decisions", type=int, default=5000)
    parser.add_argument("--policy", choices=list(POLICIES), help="one policy (default: all)")
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    print(f"{args.instances} instances, {args.decisions} decisions each, top {args.top_k} (µs)")
    print(f"{'policy':10}{'p50':>8}{'p99':>8}{'view p50':>10}{'view p99':>10}")
    results = {}
    for policy in [args.policy] if args.policy else POLICIES:
        row = measure(policy, args.instances, args.decisions, args.top_k)
        results[policy] = row
        print(
            f"{policy:10}{row['decision_p50_us']:8}{row['decision_p99_us']:8}"
            f"{row['view_p50_us']:10}{row['view_p99_us']:10}"
        )
    if args.json:
        facts = {"instances": args.instances, "decisions": args.decisions, "top_k": args.top_k}
        args.json.write_text(json.dumps(facts | {"policies": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
