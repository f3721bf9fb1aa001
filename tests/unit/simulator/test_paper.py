"""The paper's figures, with few requests."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.paper import (
    autoscaling,
    comparison,
    fragmentation,
    migration,
    page,
    priorities,
    rates,
    saturation,
    scalability,
    serving,
)
from benchmarks.paper.files import write
from benchmarks.paper.numbers import ratios

FIGURES = (migration, serving, comparison, saturation, fragmentation, priorities, autoscaling)


def arguments(folder: Path) -> list[str]:
    options = {"results": "json", "figures": "png", "cache": "cache", "page": "paper.md"}
    places = [part for name, to in options.items() for part in (f"--{name}", str(folder / to))]
    return ["--quick", "--jobs", "1", *places]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all figures."""
    folder = tmp_path_factory.mktemp("paper")
    for figure in (*FIGURES, scalability, page):
        figure.main(arguments(folder))
    return folder


@pytest.mark.slow
def test_every_figure_leaves_its_results_and_a_plot(quick: Path) -> None:
    for figure in (*FIGURES, scalability):
        assert (quick / "json" / f"{figure.NAME}.json").stat().st_size > 100
        assert (quick / "png" / f"{figure.NAME}.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_page_has_every_table(quick: Path) -> None:
    text = (quick / "paper.md").read_text()
    assert "serving: 40 requests, seeds 1" in text
    assert "S-S @ 36" in text and "Llumnix-artifact" in text
    assert not any(f"{{{place}}}" in text for place in page.PLACES)
    assert str(quick) not in text


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    page.main(arguments(tmp_path))
    assert (tmp_path / "paper.md").read_text().count(page.MISSING) == len(page.PLACES)


@pytest.mark.slow
@pytest.mark.parametrize("figure", [serving, priorities], ids=lambda figure: figure.NAME)
def test_the_same_seed_gives_the_same_results(figure: Any, quick: Path, tmp_path: Path) -> None:
    figure.main(arguments(tmp_path))  # with nothing in its cache
    name = f"json/{figure.NAME}.json"
    assert (tmp_path / name).read_bytes() == (quick / name).read_bytes()


def test_the_rate_of_the_rule_is_the_nearest_that_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_prefill", lambda row, rate, cv, options: (0.1, rate / 4))
    found = rates.search("S-S", _options(tmp_path))
    assert found["kept"] and abs(found["prefill_p99"] - 10) < 2.5
    assert found["rate"] / 4 == found["prefill_p99"]


def test_where_no_rate_is_near_the_rule_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jump(row: Any, rate: float, *_: Any) -> tuple[float, float]:
        return 0.1, 99.0 if rate > 60 else 1.0

    monkeypatch.setattr(rates, "_prefill", jump)
    assert not rates.search("S-S", _options(tmp_path))["kept"]


def _options(folder: Path) -> Any:
    return rates.read_options("x", arguments(folder))


def test_the_cost_at_an_equal_tail_is_interpolated() -> None:
    def system(p99: float, instances: float) -> Any:
        return {"pooled": {"prefill": {"p99": p99}}, "instances": instances}

    points = [
        {"systems": {"infaas": system(10, 8), "llumnix": system(1, 8), "ours": system(1, 8)}},
        {"systems": {"infaas": system(99, 6), "llumnix": system(100, 4), "ours": system(5, 4)}},
    ]
    found = autoscaling.savings(points)
    assert [one["other"] for one in found["llumnix"]] == pytest.approx([6, 4], abs=0.02)
    assert found["ours"] == []  # INFaaS++ is nowhere as good


def test_ratios_have_the_least_and_the_most_of_the_seeds() -> None:
    def numbers(time: float) -> Any:
        spread = {"mean": time, "p99": time}
        names = ("prefill", "decode", "latency", "preemption_loss")
        return dict.fromkeys(names, spread)

    base = {"pooled": numbers(4), "seeds": [numbers(2), numbers(9)]}
    other = {"pooled": numbers(2), "seeds": [numbers(4), numbers(3)]}
    assert ratios(base, other)["prefill P99"] == {"pooled": 2, "low": 0.5, "high": 3}


def test_results_are_written_the_same_way_each_time(tmp_path: Path) -> None:
    assert json.loads(write({"a": 1.5}, tmp_path, "one").read_text()) == {"a": 1.5}
    with pytest.raises(ValueError):
        write({"a": float("nan")}, tmp_path, "one")
