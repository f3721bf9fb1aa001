"""Tables of the other figures."""

from typing import Any

from benchmarks.paper.cells import HEAD, cells, short, spread, table
from benchmarks.paper.migration import WAYS
from benchmarks.paper.plots import label


def saturation(result: dict[str, Any]) -> str:
    """Over the load: pooled numbers, and how many times better than INFaaS++."""
    rows = []
    for point in result["points"]:
        where = f"{point['rate']:g}"
        for name, one in point["systems"].items():
            better = point["against_infaas"][name]
            gains = [spread(better[q]) for q in ("prefill mean", "prefill P99", "preemption loss")]
            rows.append([where, label(name), *cells(one["pooled"]), *gains])
            where = ""
    gain = "times better than INFaaS++"
    head = ["requests/s", "system", *HEAD, f"prefill mean: {gain}", "prefill P99: same"]
    return table([*head, "preemption loss: same"], rows)


def migration(result: dict[str, Any]) -> str:
    """The model against the paper, in ms."""
    head = ["tokens"] + [f"{name}: {who}" for name in WAYS.values() for who in ("paper", "model")]
    rows = [
        [f"{row['tokens']:,}"] + [short(row[who][w]) for w in WAYS for who in ("paper", "model")]
        for row in result["rows"]
    ]
    return table(head, rows)


def measured(result: dict[str, Any]) -> str:
    """What was measured on real engines, in ms."""
    rows = [
        [device, f"{row['tokens']:,}", *[short(row[way]) for way in WAYS]]
        for device, found in result["measured"].items()
        for row in found
    ]
    return table(["model, device", "tokens", *WAYS.values()], rows)


def fragmentation(result: dict[str, Any]) -> str:
    """Means until the last arrival."""
    rows = [
        [
            f"{point['trace']} @ {point['rate']:g}",
            label(name),
            f"{100 * one['mean']:.2g} %",
            f"{100 * min(one['seeds']):.2g} to {100 * max(one['seeds']):.2g} %",
            f"{100 * one['used']:.0f} %",
            short(one["waiting"]),
        ]
        for point in result["points"]
        for name, one in point["systems"].items()
    ]
    head = ["requests/s", "system", "blocks lost", "seeds", "blocks used", "requests waiting"]
    return table(head, rows)


def priorities(result: dict[str, Any], kind: str) -> str:
    """The requests of one kind, in all systems."""
    rows = []
    for point in result["points"]:
        where = f"{point['rate']:g}, CV {point['cv']:g}"
        for name, one in point[kind]["systems"].items():
            better = point[kind]["against_base"][name]
            rows.append(
                [where, label(name), *cells(one["pooled"])[:6]]
                + [spread(better[quantity]) for quantity in ("request mean", "decode mean")]
            )
            where = ""
    head = ["requests/s", "system", *HEAD[:6], "request mean: times better", "decode mean: same"]
    return table(head, rows)


def scalability(result: dict[str, Any]) -> str:
    """What was served, and what it took."""
    rows = [
        [
            f"{point['instances']:,}",
            f"{point['requests']:,}",
            label(name),
            *cells(one["numbers"]),
            f"{one['wall_seconds']:.0f}",
            f"{one['peak_megabytes']:,}",
        ]
        for point in result["points"]
        for name, one in point["systems"].items()
    ]
    head = ["instances", "requests", "system", *HEAD, "wall time (s)", "peak memory (MB)"]
    return table(head, rows)


def autoscaling(result: dict[str, Any], figure: str) -> str:
    """Latencies, and instances on average."""
    rows = []
    for point in result[figure]:
        arrivals = "Poisson" if point["cv"] is None else f"CV {point['cv']:g}"
        where = f"{point['rate']:g}, {arrivals}, x = {point['low']:g}"
        for name, one in point["systems"].items():
            seeds = one["instances_seeds"]
            count = f"{short(one['instances'])} ({short(min(seeds))} to {short(max(seeds))})"
            rows.append([where, label(name), *cells(one["pooled"]), count])
            where = ""
    return table(["requests/s", "system", *HEAD, "instances"], rows)


def savings(result: dict[str, Any]) -> str:
    """Cost at equal P99 prefill."""
    rows = [
        [
            label(name),
            *[short(one[key]) for key in ("p99", "infaas", "other")],
            f"{100 * one['saved']:.0f} %",
        ]
        for name, found in result["savings"].items()
        for one in found
    ]
    head = ["system", "P99 prefill of INFaaS++ (s)", "its instances", "instances", "saved"]
    return table(head, rows)
