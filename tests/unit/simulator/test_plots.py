"""Figures show what the records say."""

from pathlib import Path

import pytest

from llumnix.simulator import plots
from llumnix.simulator.plots import PlotsMissing, figures, save_plots
from llumnix.simulator.record import Record, encode, read, write
from llumnix.simulator.result import Result
from llumnix.simulator.summary import summarize
from tests.kit.results import result

NAMES = ["ttft", "tpot", "load", "waiting", "fragmentation", "instances"]


def record(folder: Path, run: Result) -> Record:
    write(folder / "run.json", encode(run, summarize(run), config={}, seed=0))
    return read(folder / "run.json")


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = record(tmp_path, result())
    drawn = figures({"a": one, "b": one})
    assert list(drawn) == NAMES
    (line, _) = drawn["ttft"].axes[0].lines
    assert list(line.get_xdata()) == [1.0, 2.0, 3.0]
    assert list(line.get_ydata()) == pytest.approx([1 / 3, 2 / 3, 1])
    assert list(drawn["tpot"].axes[0].lines[0].get_xdata()) == pytest.approx([100, 300])
    assert list(drawn["load"].axes[0].lines[0].get_ydata()) == [0.5, 0.7, 0.0]
    assert list(drawn["fragmentation"].axes[0].lines[0].get_ydata()) == [0.1, 0.3, 0.0]
    assert list(drawn["instances"].axes[0].lines[0].get_ydata()) == [2, 2, 2]


def test_axes_have_room_for_the_last_run_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small, large = result(), result()
    large.samples = [one._replace(instances=50) for one in large.samples]
    records = {"small": record(tmp_path, small), "large": record(tmp_path, large)}
    bottom, top = figures(records)["instances"].axes[0].get_ylim()
    assert bottom == 0 and top > 50


def test_a_run_of_nothing_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = record(tmp_path, Result([], [], 0.0, 0.0, 0.0))
    paths = save_plots({"a": one}, tmp_path, "x-")
    assert [path.name for path in paths] == [f"x-{name}.png" for name in NAMES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(PlotsMissing, match=r"pip install 'llumnix\[sim\]'"):
        figures({})
