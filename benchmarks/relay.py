"""What a token costs that is relayed between two nodes, beside a router that passes a stream on.

Three ways to the same modelled instances of one node, in turn, in one run: straight to that node;
through a second llumnix node without instances (tokens travel over the peer channel, one frame for
each step); and through PyPI's vllm-router, a Rust proxy that passes each chunk on. The cost of
relaying is the CPU time of all processes on the way, less that of the straight way.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil

from benchmarks import load
from benchmarks.servers import Server, free_port, model_folder
from tests.kit.etcd import EtcdCluster

NODE = "llumnix.entrypoints.vllm.api_server"


def node(name: str, instances: int, etcd: str) -> Server:
    """A llumnix node with modelled instances that step every few milliseconds."""
    return Server(
        name, NODE, "--model", model_folder(), "--max-model-len", "2048", "--engine", "sim",
        "--sim-profile", "cpu-smoke", "--node", name, "--etcd-endpoints", etcd,
        "--initial-instances", str(instances), "--disable-uvicorn-access-log",
    )  # fmt: skip


def cpu(processes: Sequence[psutil.Process]) -> float:
    """CPU seconds of some processes."""
    return sum(sum(p.cpu_times()[:2]) for p in processes)


def cost(url: str, processes: Sequence[psutil.Process], args: argparse.Namespace) -> float:
    """Microseconds of CPU for each token of a load on `url`."""
    before = cpu(processes)
    outcome = asyncio.run(load.run(url, "smol", args.requests, args.concurrency, args.tokens))
    return 1e6 * (cpu(processes) - before) / outcome.tokens


def start_router(path: str, backend: str) -> tuple[subprocess.Popen[bytes], str]:
    """The Rust router in front of one server, and its address."""
    port = free_port()
    command = [path, "--worker-urls", backend, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=2).close()
            return process, url
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    process.kill()
    raise RuntimeError("the router did not start")


def main() -> None:
    """Measure the three ways in turn, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(sys.executable).parent / "vllm-router"
    parser.add_argument("--router", default=str(default), help="vllm-router's command")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounds: list[dict[str, float]] = []
    router = None
    with (
        EtcdCluster(1) as etcd,
        node("back", 2, etcd.endpoints[0]) as back,
        node("front", 0, etcd.endpoints[0]) as front,
    ):
        try:
            router, router_url = start_router(args.router, back.url)
            passing = [psutil.Process(router.pid)]
            passing += passing[0].children(recursive=True)
            both = [back.process, front.process]
            for number in range(-1, args.rounds):
                straight = cost(back.url, both, args)
                relayed = cost(front.url, both, args)
                figures = {
                    "straight": straight,
                    "llumnix_relay": relayed - straight,
                    "vllm_router": cost(router_url, passing, args),
                }
                if number >= 0:  # the first round warms up
                    rounds.append(figures)
                    print(json.dumps({k: round(v, 1) for k, v in figures.items()}))
        finally:
            if router is not None:
                router.terminate()
                router.wait(20)
    medians = {k: sorted(r[k] for r in rounds)[len(rounds) // 2] for k in rounds[0]}
    print("\n| µs of CPU for each token | |\n|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.1f} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) for k, v in vars(args).items()}
        report = {"settings": settings, "rounds": rounds, "medians": medians}
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
