"""Random migrations under load on real vLLM, until so many have been made.

    python benchmarks/soak.py [--moves 1000] [--seed N]

One node with two instances streams requests with all kinds of sampling parameters. Each is first
run without moves, alone; then the same requests run again and again, some at a time, while random
ones of them are moved to the other instance at random moments and some are cancelled. In the end
every output must equal that of its unmoved run, and nothing may be left: no request, no KV block,
no key in etcd.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

from benchmarks.servers import Server, model_folder
from benchmarks.soak_requests import requests_of
from tests.kit.etcd import EtcdCluster

ENGINE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--block-size", "32"]
# So few KV blocks that prefixes are evicted, and have to be sent, and requests are preempted.
ENGINE += ["--num-gpu-blocks-override", "96"]
NEAR = 0.02  # a log-probability in another batch differs by rounding
NODE = "soak"


class Answer:
    """Everything that a client gets for one request, choice by choice."""

    def __init__(self) -> None:
        self.texts: Counter[int] = Counter()
        self.parts: dict[int, list[Any]] = {}
        self.finish: dict[int, str] = {}
        self.usage: Any = None
        self.error: str | None = None

    def take(self, event: dict[str, Any]) -> None:
        """One server-sent event."""
        if "error" in event:
            self.error = str(event["error"])
        for choice in event.get("choices", ()):
            index = choice["index"]
            said = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            found = choice.get("logprobs") or {}
            numbers = [v for v in found.get("token_logprobs") or () if v is not None]
            self.parts.setdefault(index, []).append((said, tuple(numbers)))
            if choice.get("finish_reason"):
                self.finish[index] = choice["finish_reason"]
        if event.get("usage"):
            self.usage = {k: v for k, v in event["usage"].items() if isinstance(v, int)}

    def logprobs(self) -> list[float]:
        """Those of all tokens, choice after choice."""
        return [n for _, parts in sorted(self.parts.items()) for _, ns in parts for n in ns]

    def equals(self, other: "Answer") -> bool:
        """Whether a client got the same, however the tokens were cut into events."""
        mine, yours = self.logprobs(), other.logprobs()
        alike = len(mine) == len(yours) and all(
            abs(a - b) <= NEAR for a, b in zip(mine, yours, strict=True)
        )
        return alike and self.summary() == other.summary()

    def summary(self) -> dict[str, Any]:
        """What must be the same to the letter."""
        return {
            "texts": {i: "".join(text for text, _ in p) for i, p in sorted(self.parts.items())},
            "finish": dict(sorted(self.finish.items())),
            "usage": self.usage,
            "error": self.error,
        }


class Soak:
    """The load, the moves, and the count of what happened."""

    def __init__(self, session: aiohttp.ClientSession, url: str, seed: int) -> None:
        self._session = session
        self._url = url
        self._random = random.Random(seed)
        self.count: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.done = asyncio.Event()

    async def answer(self, path: str, body: dict[str, Any], cut: int | None = None) -> Answer:
        """Stream one request, to its end or until so many events have come."""
        answer = Answer()
        events = 0
        async with self._session.post(self._url + path, json=body) as response:
            if response.status != 200:
                answer.error = await response.text()
                return answer
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                answer.take(json.loads(line[6:]))
                events += 1
                if cut is not None and events >= cut:
                    break  # leaving the block closes the connection
        return answer

    async def client(self, wanted: list[tuple[str, dict[str, Any], Answer]]) -> None:
        """One client: request after request, until the moves have been made."""
        while not self.done.is_set():
            path, body, right = self._random.choice(wanted)
            cut = self._random.randrange(1, 60) if self._random.random() < 0.12 else None
            # With a salt of its own nothing is cached of it anywhere: its blocks must be sent.
            salt = f"{self._random.getrandbits(48):x}"
            salted = {"cache_salt": salt} if self._random.random() < 0.7 else {}
            answer = await self.answer(path, body | salted, cut)
            if cut is not None and not answer.finish:
                self.count["cancelled"] += 1
                continue
            self.count["answered"] += 1
            if not answer.equals(right):
                self.count["wrong"] += 1
                said = {"right": right.summary(), "got": answer.summary()}
                self.wrong.append({"body": body, **said})

    async def mover(self, moves: int, bar: Any) -> None:
        """Moves one random request after the other."""
        while self.count["moved"] < moves:
            listed = await self._get("/llumnix/requests")
            if not listed:
                await asyncio.sleep(0.05)
                continue
            one = self._random.choice(listed)
            to = f"{NODE}-{1 - int(one['instance'][-1])}"
            await asyncio.sleep(self._random.random() * 0.2)
            body = {"request": one["id"], "to": to}
            async with self._session.post(self._url + "/llumnix/migrate", json=body) as response:
                report = await response.json()
            if response.status == 200:
                self.count["moved"] += 1
                self.count[f"stages {report['stages']}"] += 1
                self.count["blocks sent"] += report["blocks_sent"]
                self.count["blocks skipped"] += report["blocks_skipped"]
                bar.update(1)
            else:
                self.count["refused"] += 1
                self.reasons[re.sub(r"\S*\d\S*", "…", report["error"]["message"])] += 1
        self.done.set()

    async def left(self) -> dict[str, Any]:
        """What is left of it all; everything should be 0."""
        await self._until_idle()
        # The last step of a last request tells the usage of the KV cache without any.
        for _ in range(8):
            await self.answer(
                "/v1/completions",
                {"model": "smol", "prompt": "The end", "max_tokens": 2, "stream": True},
            )
        await self._until_idle()
        text = await self._get("/metrics", text=True)
        found = {
            "requests": len(await self._get("/llumnix/requests")),
            "open requests": _sum(text, "llumnix_open_requests"),
            "KV blocks in use": _sum(text, "vllm:kv_cache_usage_perc"),
        }
        return {k: round(v, 6) for k, v in found.items()}

    async def _until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while await self._get("/llumnix/requests") and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    async def _get(self, path: str, text: bool = False) -> Any:
        async with self._session.get(self._url + path) as response:
            return await (response.text() if text else response.json())


def _sum(metrics: str, name: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def run(args: argparse.Namespace, url: str, etcd: EtcdCluster) -> dict[str, Any]:
    """The unmoved runs, the moves, and what is left."""
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        soak = Soak(session, url, args.seed)
        wanted = []
        for path, body in tqdm(requests_of(args.seed, args.requests), desc="unmoved"):
            wanted.append((path, body, await soak.answer(path, body)))
        if failed := [right.error for _, _, right in wanted if right.error]:
            raise RuntimeError(f"a request fails without any move: {failed[0]}")
        began = time.monotonic()
        with tqdm(total=args.moves, desc="moves") as bar:
            movers = [soak.mover(args.moves, bar) for _ in range(args.movers)]
            clients = [soak.client(wanted) for _ in range(args.clients)]
            await asyncio.gather(*movers, *clients)
        seconds = time.monotonic() - began
        left = await soak.left()
    keys = etcd.ctl("get", "--prefix", "/llumnix/default/migrations/", "--keys-only").split()
    left["records in etcd"] = len(keys)
    return {
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "count": dict(sorted(soak.count.items())),
        "refused because": dict(soak.reasons.most_common()),
        "left": left,
        "wrong": soak.wrong,
    }


def main() -> None:
    """Run it, print what happened, and end with status 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=40, help="different requests")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--movers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with (
        EtcdCluster(1) as etcd,
        Server(
            "node", "llumnix.entrypoints.vllm.api_server", "--model", model_folder(), *ENGINE,
            "--node", NODE, "--initial-instances", "2", "--no-migration",
            "--etcd-endpoints", etcd.endpoints[0], VLLM_CPU_KVCACHE_SPACE="1",
        ) as node,
    ):  # fmt: skip
        _wait_for_both(node)
        result = asyncio.run(run(args, node.url, etcd))
    wrong = result.pop("wrong")
    print(json.dumps(result, indent=1))
    for one in wrong[:5]:
        print("WRONG", json.dumps(one), file=sys.stderr)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))
    sys.exit(bool(wrong or any(result["left"].values())))


def _wait_for_both(node: Server) -> None:
    import urllib.request

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{node.url}/status", timeout=5) as answer:
            states = [i["state"] for i in json.load(answer)["instances"]]
        if states == ["ready", "ready"]:
            return
        time.sleep(0.2)
    raise TimeoutError("the second instance was not ready in time")


if __name__ == "__main__":
    main()
