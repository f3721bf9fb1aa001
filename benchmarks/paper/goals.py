"""The goals, and whether the results meet them."""

from typing import Any

from benchmarks.paper.cells import short, table
from benchmarks.paper.numbers import value

WANTED = {"prefill mean": 7.7, "prefill P99": 13.0}  # times better than INFaaS++, at M-M @ 7.8
OURS = 1.2  # times better than Llumnix in P99 prefill or decode, on three traces
TRACES = 3
NOISE = 1.1  # less than this is chance, whatever the seeds say
TAILS = ("prefill P99", "decode P99")


def goals(result: dict[str, Any]) -> str:
    """One line for each goal."""
    rows = [*_paper(result), _better(result), _worse(result)]
    return table(["goal", "found", ""], rows)


def _paper(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for point in result["points"]:
        if point["trace"] != "M-M" or (point["basis"], point["rate"]) not in (
            ("reference", 7.8),
            ("rule", point["rate"]),
        ):
            continue
        for quantity, wanted in WANTED.items():
            ratio = point["against_infaas"]["llumnix"][quantity]
            goal = f"M-M @ {point['rate']:g}: {quantity} of Llumnix {wanted:g} times better than "
            found = f"{short(ratio['pooled'])} ({short(ratio['low'])} to {short(ratio['high'])})"
            met = "met" if ratio["pooled"] >= wanted else "missed"
            rows.append([goal + "INFaaS++", found, met if point["basis"] == "reference" else ""])
    return rows


def _better(result: dict[str, Any]) -> list[str]:
    """Better pooled, and in the majority of seeds."""
    found = []
    for point in result["points"]:
        if point["basis"] == "rule":
            wins = [quantity for quantity in TAILS if _wins(point, quantity)]
            if wins:
                ratios = [short(point["against_llumnix"]["ours"][q]["pooled"]) for q in wins]
                parts = [f"{q} {ratio}" for q, ratio in zip(wins, ratios, strict=True)]
                found.append(f"{point['trace']} ({', '.join(parts)})")
    goal = f"ours {OURS:g} times better than Llumnix in P99 prefill or decode on {TRACES} traces, "
    goal += "pooled and in most seeds"
    met = "met" if len(found) >= TRACES else "missed"
    return [goal, f"{len(found)}: {'; '.join(found) or 'none'}", met]


def _wins(point: dict[str, Any], quantity: str) -> bool:
    seeds = _seeds(point, quantity)
    most = sum(ratio >= OURS for ratio in seeds) * 2 > len(seeds)
    return most and point["against_llumnix"]["ours"][quantity]["pooled"] >= OURS


def _worse(result: dict[str, Any]) -> list[str]:
    found = [
        f"{point['trace']} @ {point['rate']:g} ({quantity} "
        f"{short(point['against_llumnix']['ours'][quantity]['pooled'])})"
        for point in result["points"]
        for quantity in TAILS
        if max(_seeds(point, quantity)) < 1
        and point["against_llumnix"]["ours"][quantity]["pooled"] < 1 / NOISE
    ]
    goal = "ours worse than Llumnix on none (worse: in every seed, and by a tenth or more pooled)"
    return [goal, "; ".join(found) or "none", "missed" if found else "met"]


def _seeds(point: dict[str, Any], quantity: str) -> list[float]:
    base, ours = (point["systems"][name]["seeds"] for name in ("llumnix", "ours"))
    return [value(a, quantity) / value(b, quantity) for a, b in zip(base, ours, strict=True)]
