"""How soon one more instance is ready, beside a fresh vLLM server of the same model.

    python benchmarks/scale_out.py

The node forks an engine from a server that has imported vLLM; a fresh server imports it anew.
"""

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.servers import Server, model_folder
from tests.kit.etcd import EtcdCluster

ENGINE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--block-size", "32"]


def ready(url: str) -> int:
    """How many instances are ready, as the node's status says."""
    with urllib.request.urlopen(f"{url}/status", timeout=5) as answer:
        instances = json.load(answer)["instances"]
    return sum(i["state"] == "ready" for i in instances)


def raise_desired(etcd: EtcdCluster, node: Server, name: str, number: int) -> float:
    """Seconds from `etcdctl put` until that many instances are ready."""
    began = time.perf_counter()
    etcd.ctl("put", f"/llumnix/default/desired/{name}", str(number))
    while ready(node.url) < number:
        if time.perf_counter() - began > 300:
            raise TimeoutError(f"instance {number} was not ready in 300 s")
        time.sleep(0.05)
    return time.perf_counter() - began


def main() -> None:
    """Measure both in turn, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = ["--model", model_folder(), *ENGINE]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    fresh, forked = [], []
    for number in range(args.rounds):
        with Server("fresh", "vllm.entrypoints.openai.api_server", *model, **environment) as server:
            fresh.append(server.started_in)
        print(f"round {number}: a fresh vLLM server is ready in {fresh[-1]:.1f} s", flush=True)
        with (
            EtcdCluster(1) as etcd,
            Server(
                "node", "llumnix.entrypoints.vllm.api_server", *model, "--node", "n",
                "--etcd-endpoints", etcd.endpoints[0], **environment,
            ) as node,
        ):  # fmt: skip
            forked.append(raise_desired(etcd, node, "n", 2))
        print(f"round {number}: one more instance is ready in {forked[-1]:.1f} s", flush=True)
    ratio = min(forked) / min(fresh)
    print(f"\n| fresh vLLM server | {min(fresh):.1f} s |\n|---|---|")
    print(f"| one more instance | {min(forked):.1f} s |\n| ratio | {ratio:.2f} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"fresh": fresh, "forked": forked, "ratio": ratio}))


if __name__ == "__main__":
    main()
