"""What one injection has cost, and the table of all of them."""

import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.cluster import Arena
from tests.chaos.load import Load, Request
from tests.chaos.mob import summary

# What a client may be told whose own node fails: docs/high_availability.md has these.
DOCUMENTED = re.compile(
    r"^broken off: |^refused \d+ times$"
    r"|no instance was ready within|is given up, as \d+ engines died"
)
_RESUMED = re.compile(r"request (\S+) goes on elsewhere at token")
SHOWN = 400  # characters of a sentence


@dataclass
class Injection:
    """A fault's way from its injection to a whole cluster; times in seconds."""

    fault: str
    target: str
    at: float
    ended: float = 0.0
    detect: float | None = None  # until a node has said so
    resume: float | None = None  # until the last request that it stopped goes on
    gap: float = 0.0  # the longest silence in a stream whose node is not the victim
    waited: float = 0.0  # the longest time to a first token
    recover: float = 0.0  # from the heal, or the injection if nobody heals it, until all is whole
    resumed: int = 0  # requests that went on elsewhere
    lost: int = 0  # tokens
    doubled: int = 0
    wrong: int = 0
    failed: int = 0  # requests whose node was not the victim
    homeless: int = 0  # requests whose node was
    refusals: int = 0
    wrongs: list[str] = field(default_factory=list)  # what is not as it should be


def measure(
    injection: Injection, arena: Arena, load: Load, detects: str, homes: frozenset[str]
) -> None:
    """Fill in what the clients have seen and the nodes have said since the injection."""
    begin, end = injection.at, injection.ended
    said = arena.said(begin)
    if detects:
        when = next((t for t, _, text in said if re.search(detects, text)), None)
        injection.detect = None if when is None else when - begin
    requests = load.since(0.0)  # those too that ended while clients left a node
    by_id = {r.id: r for r in requests if r.id}
    for when, _, text in said:
        if (found := _RESUMED.search(text)) is not None:
            injection.resumed += 1
            request = by_id.get(found[1]) or next(
                (r for i, r in by_id.items() if found[1].startswith(i)), None
            )
            on = next((t for t in request.times if t > when), None) if request else None
            if on is not None:
                injection.resume = max(injection.resume or 0.0, on - begin)
    for request in requests:
        _add(injection, request, begin, end, homes)


def _add(
    injection: Injection, request: Request, begin: float, end: float, homes: frozenset[str]
) -> None:
    if request.node not in homes:  # else its client waits for the victim itself
        injection.gap = max([injection.gap, *(b - a for a, b in request.gaps(begin, end))])
    first = request.times[0] if request.times else request.ended or time.time()
    injection.waited = max(injection.waited, first - request.began)
    if not request.ended or request.judged:
        return
    request.judged = True
    verdict, who = request.verdict, f"request {request.id or '?'} at node {request.node}"
    injection.refusals += request.refusals
    injection.lost += verdict.lost
    injection.doubled += verdict.doubled
    injection.wrong += verdict.wrong
    if not verdict.good:
        injection.wrongs.append(f"{who}: {'; '.join(verdict.notes[:3])}"[:SHOWN])
    if not request.failure:
        return
    if request.node in homes:
        injection.homeless += 1
        if not DOCUMENTED.search(request.failure):
            injection.wrongs.append(f"{who} was told: {request.failure}"[:SHOWN])
    else:
        injection.failed += 1
        at = request.ended - begin
        injection.wrongs.append(
            f"{who} failed at token {verdict.position}, {at:+.1f} s: {request.failure}"[:SHOWN]
        )


@dataclass
class Report:
    """A whole run; `write` may be called at any time."""

    path: Path
    settings: dict[str, Any]
    injections: list[Injection] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0
    quiet_gap: float = 0.0  # the longest silence in a stream before the first fault
    moved: dict[str, int] = field(default_factory=dict)
    mob: dict[str, int] = field(default_factory=dict)  # what unwelcome clients did and were told
    wrongs: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether all is as it should be."""
        return not self.wrongs and not any(i.wrongs for i in self.injections)

    def write(self) -> None:
        """The JSON file, and the table beside it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {k: v for k, v in vars(self).items() if k not in ("path", "injections")}
        whole["injections"] = [asdict(injection) for injection in self.injections]
        self.path.write_text(json.dumps(whole, indent=1, default=str))
        self.path.with_suffix(".md").write_text(self.table())

    def table(self) -> str:
        """Markdown: a line for each fault, seconds as median / longest."""
        lines = [
            "| fault | times | detect, s | resume, s | longest gap, s | whole again, s | resumed "
            "| lost | doubled | wrong | failed | with their node |",
            "|---" * 12 + "|",
        ]
        for name in dict.fromkeys(i.fault for i in self.injections):
            some = [i for i in self.injections if i.fault == name]
            times = [
                _both([v for i in some if (v := getattr(i, column)) is not None])
                for column in ("detect", "resume", "gap", "recover")
            ]
            sums = [
                str(sum(getattr(i, column) for i in some))
                for column in ("resumed", "lost", "doubled", "wrong", "failed", "homeless")
            ]
            lines.append("| " + " | ".join([name, str(len(some)), *times, *sums]) + " |")
        moves = ", ".join(f"{count} {what}" for what, count in sorted(self.moved.items()))
        lines.append(
            f"\n{self.requests} requests, {self.tokens} tokens; moves by hand: {moves or 'none'}; "
            f"longest gap before the first fault {self.quiet_gap:.2f} s. "
            f"Unwelcome clients: {summary(self.mob)}."
        )
        return "\n".join(lines) + "\n"


def _both(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} / {max(values):.2f}" if values else "-"
