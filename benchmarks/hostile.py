"""Hostile inputs beside an ordinary stream: how long does a node keep its other clients waiting?

Each attack of `benchmarks/hostile_inputs.py` strikes a node with modelled engines whose tokens come
every few milliseconds. Two processes of their own watch: one a stream, for its longest gap, and one
/livez, for its longest answer. Afterwards the node is to have nothing left of the attack.

    python -m benchmarks.hostile --out hostile.json
    python -m benchmarks.hostile --only "leave" --rounds 10
    python -m benchmarks.hostile --engine vllm

With `--engine vllm` it is one engine core of vLLM's, with its own scheduler and grammars. Its steps
take longer than modelled ones: see how long the gaps are when nothing is done.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import urllib.request
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.hostile_inputs import ATTACKS, COMPLETIONS, LONG, Attack, Target
from benchmarks.servers import Server, model_folder
from tests.kit.leaving import Client, head, post

KEY = "client"
OPERATOR = "operator"  # the token that shows the node's metrics
GOAL = 50.0  # ms, for the longest gap
ENGINES = {
    "sim": ["--engine", "sim", "--sim-profile", "cpu-smoke", "--initial-instances", "2"],
    "vllm": ["--dtype", "float32", "--enforce-eager", "--block-size", "32"],
}
# What watching leaves open: a stream, and connections of it, of the probe and of who asks.
WATCHED = {"llumnix_open_requests": 1, "llumnix_connections": 4}
WARM = 0.5  # seconds that are watched before an attack, and after it
SETTLE = 30.0  # seconds in which the node is to be as it was


def watch_stream(port: int, orders: Connection) -> None:
    """Read streams one after the other; on each order, answer with the longest gap in ms since."""
    request = post(COMPLETIONS, LONG | {"stream": True}, {"Authorization": f"Bearer {KEY}"})
    longest, last = 0.0, 0.0
    client: Client | None = None
    while True:
        if orders.poll():
            orders.recv()
            waited = time.perf_counter() - last if client and last else 0.0
            orders.send(1e3 * max(longest, waited))
            longest = 0.0
        try:
            if client is None:
                client, last = Client(port).send(request), 0.0
                client.socket.settimeout(0.5)
            data = client.read()
        except TimeoutError:
            continue  # the gap goes on; orders are looked at
        except OSError:
            data = b""
        now = time.perf_counter()
        if last:
            longest = max(longest, now - last)
        last = now
        if not data or b"data: [DONE]" in data:
            if client is not None:
                client.close()
            client = None
            time.sleep(0.0 if data else 0.1)


def watch_probe(port: int, orders: Connection) -> None:
    """Ask /livez again and again; on each order, answer with the longest time in ms since."""
    longest = 0.0
    while True:
        if orders.poll(0.02):
            orders.recv()
            orders.send(1e3 * longest)
            longest = 0.0
        began = time.perf_counter()
        try:
            client = Client(port)
            client.socket.settimeout(30.0)
            answer = client.send(head("GET", "/livez", {"Connection": "close"})).rest()
            client.close()
        except OSError:
            answer = b""
        took = time.perf_counter() - began
        longest = max(longest, took if b" 200 " in answer else float("inf"))


class Watch:
    """A process that watches something of a node."""

    def __init__(self, watching: Any, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=watching, args=(port, theirs), daemon=True)
        self._process.start()

    def longest(self) -> float:
        """Milliseconds of the longest wait since this was asked the last time."""
        self._orders.send(None)
        return float(self._orders.recv())

    def end(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def state(server: Server) -> dict[str, float]:
    """What could be left behind."""
    return {
        "descriptors": server.process.num_fds(),
        "threads": server.process.num_threads(),
        "mib": server.process.memory_info().rss / 2**20,
    }


def idle(server: Server) -> bool:
    """Whether no request is open at the node but the watched one, and no connection of others."""
    request = urllib.request.Request(
        f"{server.url}/metrics", headers={"Authorization": f"Bearer {OPERATOR}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read().decode()
    found = [re.search(rf"^{name} (\S+)", text, re.MULTILINE) for name in WATCHED]
    return all(m and float(m[1]) <= most for m, most in zip(found, WATCHED.values(), strict=True))


def run(attack: Attack, server: Server, stream: Watch, probe: Watch) -> dict[str, Any]:
    """One attack, and what it did."""
    gaps: list[float] = []

    def gap() -> float:
        gaps.append(stream.longest())
        return gaps[-1]

    target = Target(server.port, KEY, OPERATOR, lambda: idle(server), gap)
    made = attack.make(target)
    before = state(server)
    stream.longest(), probe.longest()
    time.sleep(WARM)
    began, cpu = time.perf_counter(), server.cpu_seconds()
    outcome = attack.strike(target, made)
    took = time.perf_counter() - began
    time.sleep(WARM)
    gap()
    answer = probe.longest()
    deadline = time.perf_counter() + SETTLE
    while time.perf_counter() < deadline and not (
        target.idle() and state(server)["descriptors"] <= before["descriptors"] + 4
    ):
        time.sleep(0.2)
    after = state(server)
    return {
        "attack": attack.name,
        "what": attack.what,
        "gap_ms": round(max(gaps), 1),
        "livez_ms": round(answer, 1),
        "seconds": round(took, 2),
        "node_cpu_seconds": round(server.cpu_seconds() - cpu, 2),
        "outcome": outcome,
        "left": {name: round(after[name] - before[name], 1) for name in before},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| attack | longest gap, ms | /livez, ms | what came back | left: fds, threads, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        left = ", ".join(f"{number:+g}" for number in row["left"].values())
        cells = [
            row["what"],
            f"{row['gap_ms']:.0f}",
            f"{row['livez_ms']:.0f}",
            row["outcome"],
            left,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the attacks; the exit status says whether all kept to the goal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="attacks whose names begin so")
    parser.add_argument("--rounds", type=int, default=1, help="of each attack")
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--goal-ms", type=float, default=GOAL, help="for the longest gap")
    options = parser.parse_args()
    arguments = [
        *("--model", model_folder(), *ENGINES[options.engine]),
        *("--api-key", KEY, "--admin-token", OPERATOR),
        *("--disable-uvicorn-access-log", "--max-requests", "4096"),
    ]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        server = Server(
            *("node", "llumnix.entrypoints.vllm.api_server", *arguments), VLLM_CPU_KVCACHE_SPACE="1"
        )
        stack.enter_context(server)
        watches = [Watch(watching, server.port) for watching in (watch_stream, watch_probe)]
        for watch in watches:
            stack.callback(watch.end)
        time.sleep(2.0)  # until they run
        chosen = [a for a in ATTACKS if a.name.startswith(options.only)]
        if options.engine == "vllm":
            chosen = [a for a in chosen if a.engines or a.name == "nothing"]
        for attack in chosen:
            for _ in range(options.rounds):
                row = run(attack, server, *watches)
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
        tracebacks = server.log.read_text(errors="replace").count("Traceback")
    print(table(rows))
    print(f"\ntracebacks in the node's log: {tracebacks}")
    if options.out:
        result = {
            "engine": options.engine,
            "cores": os.cpu_count(),
            "rows": rows,
            "tracebacks": tracebacks,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["gap_ms"] > options.goal_ms for row in rows))


if __name__ == "__main__":
    sys.exit(main())
