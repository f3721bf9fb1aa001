"""What high availability costs while nothing fails, and the gaps that failures leave in streams.

    python benchmarks/failover.py cost [--seconds 10] [--rounds 3] [--json FILE]
    python benchmarks/failover.py plot CHAOS_JSON PNG

`cost`: streams through three nodes with one instance each over three etcd members, against the same
streams through one node with three instances and an etcd of its own, in turns; and what the nodes
write into etcd, at rest and under load. The engines are modelled ones, at 20 ms a step.
`plot`: the longest gap for each fault of a run of `make chaos`.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

from benchmarks.servers import model_folder
from tests.kit.etcd import EtcdCluster
from tests.kit.node import Node, Nodes

OPTIONS = ("--sim-profile", "cpu-steady")
STREAMS = 24
TOKENS = 200


class Streams:
    """Clients that ask one after the other, each at the next node, until they are stopped."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._urls = itertools.cycle(f"{node.url}/v1/completions" for node in nodes)
        self._numbers = itertools.count()
        self.tokens = 0

    async def run(self, seconds: float) -> float:
        """Tokens a second, over so many seconds behind a second of warm-up."""
        async with aiohttp.ClientSession() as session:
            clients = [asyncio.create_task(self._client(session)) for _ in range(STREAMS)]
            await asyncio.sleep(1.0)
            before, began = self.tokens, time.monotonic()
            await asyncio.sleep(seconds)
            rate = (self.tokens - before) / (time.monotonic() - began)
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        return rate

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while True:
            body = {"model": "small", "prompt": f"Number {next(self._numbers)}", "stream": True}
            body |= {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
            async with session.post(next(self._urls), json=body) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        choices = json.loads(line[6:])["choices"]
                        self.tokens += sum(len(c.get("token_ids") or ()) for c in choices)


def revision(etcd: EtcdCluster) -> int:
    """How much has been written into etcd so far."""
    fields = etcd.ctl("get", "x", "--write-out=fields").splitlines()
    return int(next(line for line in fields if line.startswith('"Revision"')).split()[-1])


def writes(etcd: EtcdCluster, nodes: int, began: tuple[int, float]) -> float:
    """Writes a second and node since a revision and a moment."""
    return (revision(etcd) - began[0]) / (time.monotonic() - began[1]) / nodes


def cost(seconds: float, rounds: int) -> dict[str, Any]:
    """Both ways in turns, and the writes of the one with three nodes."""
    folder, model = Path(tempfile.mkdtemp(prefix="llumnix-bench-")), model_folder()
    with EtcdCluster(3) as etcd:
        single = Nodes(folder / "single", [], "single", model)
        triple = Nodes(folder / "triple", etcd.endpoints, "triple", model)
        for nodes in (single, triple):
            nodes.folder.mkdir()
        try:
            one = [single.start("one", *OPTIONS, "--initial-instances", "3")]
            three = [triple.start(name, *OPTIONS) for name in "abc"]
            for node in (*one, *three):
                node.ready(120.0)
            time.sleep(5.0)
            began = revision(etcd), time.monotonic()
            time.sleep(seconds)
            rest = writes(etcd, 3, began)
            rates: dict[str, list[float]] = {"one node": [], "three nodes": []}
            load = 0.0
            for _ in tqdm(range(rounds)):
                rates["one node"].append(asyncio.run(Streams(one).run(seconds)))
                began = revision(etcd), time.monotonic()
                rates["three nodes"].append(asyncio.run(Streams(three).run(seconds)))
                load = max(load, writes(etcd, 3, began))
        finally:
            single.close()
            triple.close()
    pairs = zip(rates["three nodes"], rates["one node"], strict=True)
    return {
        "streams": STREAMS,
        "tokens_per_second": {k: [round(v, 1) for v in vs] for k, vs in rates.items()},
        "ratio": round(statistics.median(three / one for three, one in pairs), 3),
        "etcd_writes_per_second_and_node": {
            "at rest": round(rest, 2),
            "under load": round(load, 2),
        },
        "keep_alives_per_second_and_node": 0.5,  # one in a third of --lease-ttl, which is 6 s
    }


def plot(result: Path, file: Path) -> None:
    """A line for each fault: every injection's longest gap, and the median."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    injections = json.loads(result.read_text())["injections"]
    names = list(dict.fromkeys(i["fault"] for i in injections))[::-1]
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(names) + 1.2))
    for row, name in enumerate(names):
        gaps = [i["gap"] for i in injections if i["fault"] == name]
        axes.plot(gaps, [row] * len(gaps), ".", color="tab:blue", alpha=0.5)
        axes.plot(statistics.median(gaps), row, "|", color="black", ms=12)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="longest gap in any stream, s", xlim=(0, None))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    costs = commands.add_parser("cost", help="of three nodes and three etcd members")
    costs.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    costs.add_argument("--rounds", type=int, default=3)
    costs.add_argument("--json", type=Path)
    plots = commands.add_parser("plot", help="the gaps of a run of make chaos")
    plots.add_argument("result", type=Path)
    plots.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.command == "plot":
        plot(args.result, args.file)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = cost(args.seconds, args.rounds)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
