"""Results as Markdown: each system's numbers, and how they compare with one of them."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.cluster.results import Run

HEAD = (
    *("requests/s", "system", "seeds", "TTFT mean", "P50", "P99", "TPOT mean", "P99"),
    *("longest gap mean", "P99", "end to end mean", "P99", "preempted", "tokens/s"),
    *("server's cores", "failed", "unfinished", "moves", "a move", "stranded"),
)
COMPARED = (("ttft", "mean"), ("ttft", "p99"), ("tpot", "p99"), ("gap", "p99"), ("e2e", "mean"))
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "gap": "gap", "e2e": "end to end"}


class Group(NamedTuple):
    """What shares a table."""

    cluster: str
    shape: str
    cv: float

    @property
    def title(self) -> str:
        """For a heading."""
        arrivals = "Poisson" if self.cv == 1 else f"CV {self.cv:g}"
        return f"{self.shape}, {arrivals}: {self.cluster}"


Rows = dict[tuple[float, str], list[Run]]  # by rate and system


def groups(runs: Sequence[Run]) -> dict[Group, Rows]:
    """The runs of comparisons, by what is offered to which cluster."""
    found: dict[Group, Rows] = {}
    for run in runs:
        if run["rate"] is None or run.get("cost"):
            continue
        rows = found.setdefault(Group(run["cluster"], run["shape"], run["cv"]), {})
        rows.setdefault((run["rate"], run["system"]), []).append(run)
    return found


def value(run: Run, quantity: str, number: str) -> float | None:
    """One number of a run in milliseconds, if it has it."""
    found = run["figures"][quantity].get(number)
    return None if found is None else found * 1e3


def over_seeds(runs: Sequence[Run], quantity: str, number: str) -> list[float]:
    """That number of each run that has it."""
    found = (value(run, quantity, number) for run in runs)
    return [one for one in found if one is not None]


def report(merged: dict[str, Any], base: str) -> str:
    """Everything."""
    parts = []
    for group, rows in groups(merged["runs"]).items():
        parts += [f"### {group.title}", _numbers(rows), _comparison(rows, base)]
    for cost in merged.get("costs", ()):
        parts.append(_cost(cost))
    if merged["knees"]:
        parts.append(_knees(merged["knees"]))
    if merged["skipped"]:
        parts.append("Not done:\n\n" + "\n".join(f"- {_first(one)}" for one in merged["skipped"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _numbers(rows: Rows) -> str:
    lines = [line(HEAD), "|---" * len(HEAD) + "|"]
    for (rate, system), runs in sorted(rows.items(), key=lambda one: one[0][0]):
        cells = [f"{rate:g}", system, str(len({run["seed"] for run in runs}))]
        cells += [_mean(runs, "ttft", number) for number in ("mean", "p50", "p99")]
        cells += [_mean(runs, "tpot", number, 1) for number in ("mean", "p99")]
        cells += [_mean(runs, q, n) for q in ("gap", "e2e") for n in ("mean", "p99")]
        cells.append(_count(runs, lambda run: run["server"]["preemptions"]))
        cells.append(_count(runs, lambda run: run["figures"]["tokens_per_second"]))
        cores = fmean(run["server_cpu_seconds"] / run["took"] for run in runs)
        cells.append(f"{cores:.2f}")
        cells += [_sum(runs, name) for name in ("failed", "unfinished")]
        lines.append(line([*cells, *_moves(runs), _stranded(runs)]))
    text = "Milliseconds, means over the seeds; counts of failures and moves are of all seeds. "
    text += "Stranded: for which share of the time, and for how many seconds at most, requests "
    text += "waited at one instance while another had room and none waiting."
    return "\n".join([text, "", *lines])


def _comparison(rows: Rows, base: str) -> str:
    """Ratios to the base: how many times less, with the least and the most of a seed."""
    head = ["requests/s", "system", *(f"{_NAMES[q]} {_number(n)}" for q, n in COMPARED)]
    lines = []
    for (rate, system), runs in sorted(rows.items(), key=lambda one: one[0][0]):
        theirs = rows.get((rate, base))
        if theirs is None or system == base:
            continue
        cells = [f"{rate:g}", system]
        cells += [_ratio(runs, theirs, *one) for one in COMPARED]
        lines.append(line(cells))
    if not lines:
        return ""
    text = f"{base}'s latency over the system's (above 1: the system is better); in brackets the "
    text += "least and the most of one seed:"
    return "\n".join([text, "", line(head), "|---" * len(head) + "|", *lines])


def _ratio(runs: Sequence[Run], base: Sequence[Run], quantity: str, number: str) -> str:
    mine, theirs = (
        {run["seed"]: found for run in some if (found := value(run, quantity, number))}
        for some in (runs, base)
    )
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return "-"
    means = [fmean(one[seed] for seed in both) for one in (theirs, mine)]
    each = [theirs[seed] / mine[seed] for seed in both]
    return f"{means[0] / means[1]:.2f} ({min(each):.2f} to {max(each):.2f})"


def _cost(cost: dict[str, Any]) -> str:
    found = cost["ratios"]
    lines = [f"### One instance beside `vllm serve`: {cost['cluster']}", ""]
    lines += ["| llumnix / vLLM | |", "|---|---|"]
    for key, text in (("burst", "all at once"), ("light", "light load")):
        spread = found[f"{key}_throughput"]
        cell = "{median:.3f} ({least:.3f} to {most:.3f})".format(**spread)
        lines.append(f"| throughput, {text}: median of {found['rounds']} rounds | {cell} |")
    for quantity in ("ttft", "tpot", "e2e"):
        for number, ratio in found[quantity].items():
            name = f"{_NAMES[quantity]} {_number(number)}, light load"
            lines.append(f"| {name} | {ratio:.3f} |")
    if "server_cpu" in found:
        lines.append(f"| CPU time of the server's process | {found['server_cpu']:.3f} |")
    return "\n".join(lines)


def _knees(knees: Sequence[dict[str, Any]]) -> str:
    lines = []
    for knee in knees:
        beyond = f", below {knee['beyond']:.3g}/s" if knee["beyond"] else ""
        bound = f"P99 TTFT within {knee['bound']:g} s"
        name = f"{knee['shape']} (CV {knee['cv']:g})"
        lines.append(f"- {name}: above {knee['rate']:.3g}/s{beyond}, by {bound}")
    return "Knees:\n\n" + "\n".join(lines)


def _moves(runs: Sequence[Run]) -> list[str]:
    outcomes: dict[str, int] = {}
    for run in runs:
        for outcome, number in run["server"]["moves"].items():
            outcomes[outcome] = outcomes.get(outcome, 0) + number
    times = [run["server"]["move_seconds"] for run in runs if run["server"]["move_seconds"]]
    count = sum(one["count"] for one in times)
    mean = sum(one["count"] * one["mean"] for one in times) / count if count else None
    said = ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.items())
    return [said or "-", "-" if mean is None else f"{mean * 1e3:,.0f}"]


def _stranded(runs: Sequence[Run]) -> str:
    seen = [run["watch"] for run in runs if run.get("watch")]
    if not seen:
        return "-"
    share = fmean(one["stranded_share"] for one in seen)
    return f"{share:.0%}, {max(one['stranded_longest'] for one in seen):.1f} s"


def _mean(runs: Sequence[Run], quantity: str, number: str, digits: int = 0) -> str:
    values = over_seeds(runs, quantity, number)
    return f"{fmean(values):,.{digits}f}" if values else "-"


def _count(runs: Sequence[Run], of: Callable[[Run], float]) -> str:
    return f"{fmean(of(run) for run in runs):,.0f}"


def _sum(runs: Sequence[Run], name: str) -> str:
    return f"{sum(run['figures'][name] for run in runs):,}"


def _number(name: str) -> str:
    return name if name == "mean" else name.upper()


def _first(text: str) -> str:
    return text.splitlines()[0]


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
