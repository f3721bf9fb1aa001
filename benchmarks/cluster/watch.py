"""Looks at the engines while a run is under way: where requests wait, and who could take them."""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks.cluster.scrape import Sample

_ROOM = 0.9  # share of the KV cache below which an instance can take what waits elsewhere
_WAITING = "vllm:num_requests_waiting"
_TOKENS = "vllm:generation_tokens_total"
_USED = "vllm:kv_cache_usage_perc"


class Look(NamedTuple):
    """One look at all engines."""

    at: float  # seconds from the first one
    waiting: list[int]  # requests, of each engine
    used: list[float]  # share of the KV cache, of each engine

    @property
    def stranded(self) -> bool:
        """Whether requests wait at one engine while another one has room and none waiting."""
        room = any(
            not waiting and used < _ROOM
            for waiting, used in zip(self.waiting, self.used, strict=True)
        )
        return room and any(self.waiting)


def look(at: float, servers: Sequence[Sequence[Sample]]) -> Look:
    """What the metrics of some servers say, of each engine that has had a request.

    A server may name engines that do not run, which have no requests and nothing but room.
    """
    begun: set[tuple[int, str]] = set()
    waiting: dict[tuple[int, str], float] = {}
    used: dict[tuple[int, str], float] = {}
    for place, samples in enumerate(servers):
        for sample in samples:
            engine = place, sample.labels.get("engine", "")
            if sample.name == _WAITING:
                waiting[engine] = sample.value
            elif sample.name == _USED:
                used[engine] = sample.value
            elif sample.name == _TOKENS and sample.value:
                begun.add(engine)
    both = sorted(waiting.keys() & used.keys() & begun)
    return Look(
        round(at, 2), [round(waiting[one]) for one in both], [round(used[one], 3) for one in both]
    )


def summary(looks: Sequence[Look]) -> dict[str, Any]:
    """How much of the time requests were stranded, the longest stretch, and all looks."""
    longest = since = 0.0
    seconds = 0.0
    for before, after in pairwise(looks):
        if before.stranded and after.stranded:
            seconds += after.at - before.at
            longest = max(longest, after.at - since)
        else:
            since = after.at
    whole = looks[-1].at if looks else 0.0
    return {
        "stranded_share": round(seconds / whole, 4) if whole else 0.0,
        "stranded_longest": round(longest, 2),
        "looks": [list(one) for one in looks],
    }


class Watch:
    """A thread that looks every so many seconds, from start to end of a `with` block; 0: never.

    A server needs some milliseconds for an answer, in which it streams no tokens: not for runs
    whose gaps are to be compared.
    """

    def __init__(self, scrape: Callable[[], Sequence[Sequence[Sample]]], every: float) -> None:
        self._scrape, self._every = scrape, every
        self._looks: list[Look] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        if self._every > 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=30)

    def seen(self) -> dict[str, Any]:
        """The summary; nothing if it did not look."""
        return summary(self._looks) if self._looks else {}

    def _run(self) -> None:
        began = time.monotonic()
        while not self._over.wait(self._every):
            at = time.monotonic() - began
            self._looks.append(look(at, self._scrape()))
