"""Tables of the serving figure, beside the paper's numbers where the reference has them."""

from collections.abc import Sequence
from typing import Any

from benchmarks.paper.cells import HEAD, cells, short, spread, table
from benchmarks.paper.numbers import QUANTITIES
from benchmarks.paper.plots import label

# INFaaS++ and Llumnix in the paper's Fig. 11, where the reference has them; seconds.
PAPER = {
    ("S-S", 32): {
        "prefill P99": (40.0, 28.2),
        "prefill mean": (1.60, 1.30),
        "decode P99": (0.122, 0.124),
        "request mean": (9.32, 9.11),
        "request P99": (111, 103),
        "preemption loss": (0.205, 0.173),
    },
    ("S-S", 36): {
        "prefill P99": (71.7, 74.6),
        "prefill mean": (4.65, 4.33),
        "decode P99": (0.162, 0.144),
        "request mean": (13.3, 12.6),
        "request P99": (167, 114),
        "preemption loss": (0.509, 0.272),
    },
    ("M-M", 7.8): {
        "prefill P99": (240, 18.1),
        "prefill mean": (5.91, 0.76),
        "decode P99": (0.152, 0.117),
        "request mean": (21.4, 15.0),
        "request P99": (338, 246),
        "preemption loss": (1.41, 0.33),
    },
}


def serving(result: dict[str, Any], basis: str) -> str:
    """One block of rows for each trace and rate."""
    rows = []
    for point in result["points"]:
        if point["basis"] != basis:
            continue
        where = f"**{point['trace']} @ {point['rate']:g}**"
        for name, one in point["systems"].items():
            rows.append([where, label(name), *cells(one["pooled"])])
            where = ""
        floor = [short(point["alone"]["mean"]), short(point["alone"]["p99"])]
        rows.append(["", "*alone*", *floor, *[""] * (len(QUANTITIES) - 2)])
        for place, name in enumerate(("INFaaS++", "Llumnix")):
            if paper := PAPER.get((point["trace"], point["rate"])):
                known = [paper[q][place] if q in paper else None for q in QUANTITIES]
                units = [1e3 if "decode" in q else 1.0 for q in QUANTITIES]
                texts = [f"*{short(c, u)}*" for c, u in zip(known, units, strict=True)]
                rows.append(["", f"*paper: {name}*", *texts])
    return table(["requests/s", "system", *HEAD], rows)


def better(result: dict[str, Any], base: str, names: Sequence[str], basis: str) -> str:
    """How many times better some systems are than another, pooled and over the seeds."""
    wanted = [name for name in QUANTITIES if name != "decode mean"]
    rows = [
        [f"{point['trace']} @ {point['rate']:g}", label(name)]
        + [spread(point[f"against_{base}"][name][quantity]) for quantity in wanted]
        for point in result["points"]
        if point["basis"] == basis
        for name in names
    ]
    return table(["requests/s", "system", *wanted], rows)


def load(result: dict[str, Any]) -> str:
    """What explains the latencies: memory, fragmentation, preemptions, moves; by prompt length."""
    rows = []
    for point in result["points"]:
        if point["basis"] != "rule":
            continue
        for name in ("infaas", "llumnix", "artifact", "ours"):
            one = point["systems"][name]
            prompts = [
                f"{short(kind.get('mean'))} / {short(kind.get('p99'))}" for kind in one["by_prompt"]
            ]
            shares = [one["memory_load"], one["fragmentation"], one["pooled"]["preempted"]]
            rows.append(
                [f"{point['trace']} @ {point['rate']:g}", label(name)]
                + [f"{100 * share:.2g} %" for share in shares]
                + [short(one["pooled"]["moves"]), *prompts]
            )
    bounds = ["< 256", "< 1,024", "< 4,096", "longer"]
    head = ["requests/s", "system", "KV used", "lost to fragmentation", "preempted"]
    head += ["moves a request", *[f"prefill mean / P99, prompt {bound}" for bound in bounds]]
    return table(head, rows)
