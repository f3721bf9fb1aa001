"""Writes docs/paper.md from the results of all figures, and the text in page.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.paper import goals, serving_tables, tables
from benchmarks.paper.cells import short, table
from benchmarks.paper.files import read
from benchmarks.paper.options import read_options

TEMPLATE = Path(__file__).with_name("page.md")
MISSING = "*Not run.*"
RIVALS = ("llumnix", "artifact", "ours")

# For each place of the template: whose results, and what is made of them.
PLACES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "goals_paper": ("serving", goals.paper),
    "goals_best": ("saturation", goals.best),
    "goals_ours": ("comparison", goals.ours),
    "saturation": ("saturation", tables.saturation),
    "serving_reference": ("serving", lambda r: serving_tables.serving(r, "reference")),
    "serving_rule": ("serving", lambda r: serving_tables.serving(r, "rule")),
    "better_reference": (
        "serving",
        lambda r: serving_tables.better(r, "infaas", RIVALS, "reference"),
    ),
    "better_rule": ("serving", lambda r: serving_tables.better(r, "infaas", RIVALS, "rule")),
    "against_llumnix": (
        "serving",
        lambda r: serving_tables.better(r, "llumnix", RIVALS[1:], "rule"),
    ),
    "load": ("serving", serving_tables.load),
    "rates": ("serving", lambda r: rates(r)),
    "migration": ("migration", tables.migration),
    "measured": ("migration", tables.measured),
    "fragmentation": ("fragmentation", tables.fragmentation),
    "priorities_high": ("priorities", lambda r: tables.priorities(r, "high")),
    "priorities_normal": ("priorities", lambda r: tables.priorities(r, "normal")),
    "scalability": ("scalability", tables.scalability),
    "autoscaling_rates": ("autoscaling", lambda r: tables.autoscaling(r, "rates")),
    "autoscaling_burstiness": ("autoscaling", lambda r: tables.autoscaling(r, "burstiness")),
    "autoscaling_cost": ("autoscaling", lambda r: tables.autoscaling(r, "cost")),
    "savings": ("autoscaling", tables.savings),
}
FIGURES = ("serving", "saturation", "fragmentation", "priorities", "autoscaling")


def rates(result: dict[str, Any]) -> str:
    """The prefill of Llumnix at the rates of the rule, with the seed by which they were found."""
    rows = []
    for point in result["points"]:
        if point["basis"] == "rule":
            prefill = point["systems"]["llumnix"]["seeds"][0]["prefill"]
            rows.append(
                [point["trace"], *map(short, (point["rate"], prefill["p50"], prefill["p99"]))]
            )
    return table(["trace", "requests/s", "P50 prefill (s)", "P99 prefill (s)"], rows)


def what_was_run(folder: Path) -> str:
    """The requests and seeds of each figure, and what was skipped."""
    parts = []
    for name in FIGURES:
        if result := read(folder, name):
            seeds = ", ".join(str(seed) for seed in result["seeds"])
            parts.append(f"{name}: {result['requests']:,} requests, seeds {seeds}")
            if result.get("skipped"):
                parts.append(f"without {' and '.join(result['skipped'])}, whose files are missing")
    return (
        "; ".join(parts) + ". Azure's traces have their own times and lengths, so that there "
        "seeds only settle which of equal instances takes a request; the code trace has 8,819."
    )


def write_page(results: Path, file: Path) -> None:
    """Fill the template."""
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("{run}", what_was_run(results))
    for place, (name, made) in PLACES.items():
        result = read(results, name)
        text = text.replace(f"{{{place}}}", made(result) if result else MISSING)
    file.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write the page of the results that there are."""
    options = read_options(__doc__, argv)
    write_page(options.results, options.page)


if __name__ == "__main__":
    main()
