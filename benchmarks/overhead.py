"""What llumnix's server costs beside vLLM's own, on the same engine, in one run.

    python benchmarks/overhead.py --engine modelled   # only the servers' cost counts
    python benchmarks/overhead.py --engine cpu        # real vLLM on the CPU
    python benchmarks/overhead.py --api-servers 2     # each with so many API servers

Both servers run stock vLLM's engine core and scheduler in a process of their own. With `modelled`
the executor beneath it is llumnix.engine.sim.executor, whose steps take no time, so that tokens
for each CPU second of the server's process (or processes) compare the two servers.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import load
from benchmarks.servers import Server, model_folder

VLLM = "vllm.entrypoints.openai.api_server"
LLUMNIX = "llumnix.entrypoints.vllm.api_server"
ENGINES = {
    "modelled": ["--distributed-executor-backend", "llumnix.engine.sim.executor.ModelledExecutor"],
    "cpu": ["--dtype", "float32", "--enforce-eager"],
}


def measure(server: Server, args: argparse.Namespace, round_number: int) -> dict[str, float]:
    """One round of load on a running server."""
    used = server.cpu_seconds if args.api_servers == 1 else server.whole_cpu_seconds
    before = used()
    first = round_number * 1_000_000  # prompts of its own, for no prefix cache to help
    outcome = asyncio.run(
        load.run(server.url, "smol", args.requests, args.concurrency, args.tokens, first)
    )
    cpu = used() - before
    return outcome.summary() | {
        "server_cpu_seconds": cpu,
        "tokens_per_cpu_second": outcome.tokens / cpu,
    }


def main() -> None:
    """Measure both servers in turn, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, default="modelled")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--profile", default="instant", help="step times of the modelled engine")
    parser.add_argument("--api-servers", type=int, default=1, help="of each system")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine = [
        "--model", model_folder(), "--max-model-len", "2048", "--block-size", "32",
        "--no-enable-log-requests", *ENGINES[args.engine],
    ]  # fmt: skip
    if args.api_servers > 1:
        engine += ["--api-server-count", str(args.api_servers)]
    results: dict[str, list[dict[str, float]]] = {"vllm": [], "llumnix": []}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "LLUMNIX_SIM_PROFILE": args.profile}
    quiet = ["--disable-uvicorn-access-log"]
    with (
        Server("vllm", VLLM, *engine, *quiet, **environment) as vllm,
        Server("llumnix", LLUMNIX, *engine, *quiet, **environment) as llumnix,
    ):
        for round_number in range(-1, args.rounds):
            for server in (vllm, llumnix):
                result = measure(server, args, round_number + 1)
                if round_number >= 0:  # the first one warms both up
                    results[server.name].append(result)
                    print(server.name, json.dumps({k: round(v, 2) for k, v in result.items()}))
        memory = {s.name: s.process.memory_info().rss / 2**20 for s in (vllm, llumnix)}
    report = {
        "engine": args.engine,
        "settings": {k: str(v) for k, v in vars(args).items()},
        "rounds": results,
        "rss_mib": memory,
        "ratios": ratios(results),
    }
    table(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2))


def ratios(results: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """llumnix over vLLM for each figure, by the medians of the rounds."""

    def median(name: str, key: str) -> float:
        values = sorted(r[key] for r in results[name])
        return values[len(values) // 2]

    keys = results["vllm"][0]
    return {k: median("llumnix", k) / median("vllm", k) for k in keys if median("vllm", k)}


def table(report: dict) -> None:
    """Print the ratios and the memory."""
    print(f"\n| {report['engine']} engine | llumnix / vLLM |\n|---|---|")
    for key, value in report["ratios"].items():
        if key not in ("requests", "tokens"):
            print(f"| {key} | {value:.3f} |")
    for name, value in report["rss_mib"].items():
        print(f"| resident memory of {name}, MiB | {value:.0f} |")


if __name__ == "__main__":
    main()
