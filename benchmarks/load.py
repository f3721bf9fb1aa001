"""A load of streaming completions, and what its clients saw of it."""

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field

import aiohttp


@dataclass
class Seen:
    """What one client saw of one stream; times in seconds."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    chunks: int = 0  # server-sent events with text; a busy server puts several tokens in one
    tokens: int = 0  # as the server's own usage says

    @property
    def ttft(self) -> float:
        return self.first - self.sent


@dataclass
class Outcome:
    """What all clients saw."""

    seconds: float
    streams: list[Seen] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.streams)

    def summary(self) -> dict[str, float]:
        """Tokens, throughput, and percentiles of the time to first token and per token."""
        ttft = sorted(s.ttft for s in self.streams)
        tpot = sorted((s.last - s.first) / max(s.tokens - 1, 1) for s in self.streams)
        return {
            "requests": len(self.streams),
            "tokens": self.tokens,
            "chunks": sum(s.chunks for s in self.streams),
            "tokens_per_second": self.tokens / self.seconds,
            "ttft_p50_ms": 1e3 * percentile(ttft, 50),
            "ttft_p99_ms": 1e3 * percentile(ttft, 99),
            "tpot_p50_ms": 1e3 * percentile(tpot, 50),
            "tpot_mean_ms": 1e3 * statistics.fmean(tpot),
        }


def percentile(ordered: list[float], percent: float) -> float:
    """The nearest-rank percentile of an ordered list."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def prompt(number: int, words: int = 24) -> str:
    """A prompt of its own for each request, so that no prefix cache helps."""
    return f"Request {number}: " + " ".join(
        f"{(number * 7919 + i * 104729) % 9973}" for i in range(words)
    )


async def _stream(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> Seen:
    seen = Seen(time.perf_counter())
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if b'"choices":[]' in line:
                seen.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            elif line.startswith(b"data: {"):
                seen.last = time.perf_counter()
                seen.first = seen.first or seen.last
                seen.chunks += 1
    return seen


async def run(
    url: str, model: str, requests: int, concurrency: int, tokens: int, first: int = 0
) -> Outcome:
    """Send `requests` streams of `tokens` tokens, `concurrency` at a time."""
    gate = asyncio.Semaphore(concurrency)

    async def one(number: int) -> Seen:
        body = {
            "model": model,
            "prompt": prompt(number),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with gate:
            return await _stream(session, url, body)

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        began = time.perf_counter()
        streams = await asyncio.gather(*(one(first + n) for n in range(requests)))
        return Outcome(time.perf_counter() - began, list(streams))


def main() -> None:
    """Run the load once and print what was seen as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", default="smol")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    args = parser.parse_args()
    outcome = asyncio.run(
        run(args.url, args.model, args.requests, args.concurrency, args.tokens, args.first)
    )
    print(json.dumps(outcome.summary()))


if __name__ == "__main__":
    main()
