"""The goals, and whether the results meet them."""

from typing import Any

from benchmarks.paper.cells import short, table
from benchmarks.paper.plots import label
from benchmarks.paper.systems import EVERY

WANTED = {"prefill mean": 7.7, "prefill P99": 13.0}  # times better than INFaaS++
PLACE = ("M-M", 7.8)  # where, in the paper
OURS, TRACES = 1.2, 3  # times better than Llumnix in P99 prefill or decode, and on how many traces
TAILS = ("prefill P99", "decode P99")


def paper(result: dict[str, Any]) -> str:
    """What the paper found at M-M, at its rate and at that of the rule."""
    rows = []
    for point in result["points"]:
        if point["trace"] != PLACE[0] or point["rate"] < PLACE[1]:
            continue
        for quantity, wanted in WANTED.items():
            ratio = point["against_infaas"]["llumnix"][quantity]
            base = point["systems"]["infaas"]["pooled"]["prefill"]
            statistic = quantity.split()[1].lower()
            rows.append(
                [
                    f"{point['trace']} @ {point['rate']:g}: {quantity}",
                    f"{wanted:g}",
                    f"{short(ratio['pooled'])} ({short(ratio['low'])} to {short(ratio['high'])})",
                    short(base[statistic] / point["alone"][statistic]),
                    "met" if ratio["pooled"] >= wanted else "missed",
                ]
            )
    head = ["Llumnix against INFaaS++", "goal", "times better", "most that is possible", ""]
    return table(head, rows)


def best(result: dict[str, Any]) -> str:
    """At which load the gain in P99 is largest, whatever the rate."""
    point = max(
        result["points"], key=lambda one: one["against_infaas"]["llumnix"]["prefill P99"]["pooled"]
    )
    parts = [
        f"{label(name)} {short(gain['prefill mean']['pooled'])} times in mean prefill and "
        f"{short(gain['prefill P99']['pooled'])} times in its P99"
        for name, gain in point["against_infaas"].items()
        if name != "infaas"
    ]
    return (
        f"Of the loads of M-M that were run ([below](#from-light-load-to-overload)) the gain over "
        f"INFaaS++ is largest at {point['rate']:g} requests/s: {'; '.join(parts)}."
    )


def ours(result: dict[str, Any]) -> str:
    """Where each of ours is better than Llumnix, where worse, and where there is no telling."""
    parts = []
    for system in dict.fromkeys(point["system"] for point in result["points"]):
        points = [point for point in result["points"] if point["system"] == system]
        parts.append(f"**{EVERY[system].label}**\n\n{_compared(points)}")
    return "\n\n".join(parts)


def _compared(points: list[dict[str, Any]]) -> str:
    rows, wins, losses = [], [], []
    for point in points:
        row = [f"{point['trace']} @ {point['rate']:g}"]
        for quantity in TAILS:
            ratio = point["ratios"][quantity]
            row += [
                interval(ratio),
                short(ratio["pooled"]),
                f"{ratio['better']} of {len(point['seeds'])}",
            ]
        known = [point["ratios"][quantity] for quantity in TAILS]
        if any(one.get("mean", 0) >= OURS and one["low"] > 1 for one in known):
            wins.append(point["trace"])
        if any(one.get("high", 1) < 1 for one in known):
            losses.append(point["trace"])
        rows.append(row)
    head = ["requests/s"]
    for quantity in TAILS:
        head += [f"{quantity}: times better", "pooled", "better seeds"]
    return f"{table(head, rows)}\n\n{_verdict(wins, losses)}"


def _verdict(wins: list[str], losses: list[str]) -> str:
    met = "met" if len(wins) >= TRACES else "missed"
    none = "met" if not losses else "missed"
    return (
        f"Better by {OURS:g} or more, with an interval above 1, in P99 prefill or P99 decode: "
        f"{', '.join(wins) or 'none'} (goal: {TRACES} traces; **{met}**). Worse, with an interval "
        f"below 1: {', '.join(losses) or 'none'} (goal: none; **{none}**)."
    )


def interval(ratio: dict[str, Any]) -> str:
    """A geometric mean over seeds and its interval."""
    if "mean" not in ratio:
        return "-"
    return f"{short(ratio['mean'])} ({short(ratio['low'])} to {short(ratio['high'])})"
