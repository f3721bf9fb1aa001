"""The command, on a cluster that takes no time to simulate."""

import subprocess
import sys
from pathlib import Path

import pytest

from llumnix.entrypoints import simulate
from llumnix.entrypoints.simulate import main
from llumnix.simulator import plots
from llumnix.simulator.record import read

TEXT = """
seeds: [0, 1]
cluster: {instances: 3}
workload: {requests: 5, arrivals: {process: burst}, prompt: 4, output: 2}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_prints_a_table_for_each_seed(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(config)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("seed 0: 5 requests, 0 of them too long (cut)\n")
    assert "seed 1: 5 requests" in printed
    assert "3.000 instances on average" in printed


def test_a_run_leaves_records_and_figures(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "some" / "where"
    assert main(["run", str(config), "--out", str(out), "--quiet"]) == 0
    assert {"tiny-0.json", "tiny-1.json", "tiny-ttft.png", "tiny-load.png"} <= names(out)
    record = read(out / "tiny-1.json")
    assert record.seed == 1 and record.config["cluster"] == {"instances": 3}


def test_other_seeds_compressed_without_figures(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(config), "--out", str(out), "--seed", "7", "8", "--gzip", "--no-plots"]
    assert main(arguments) == 0
    assert names(out) == {"tiny-7.json.gz", "tiny-8.json.gz"}
    assert len(read(out / "tiny-8.json.gz").requests[0]["tokens_us"]) == 2


def test_figures_of_several_records(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    main(["run", str(config), "--out", str(tmp_path), "--no-plots"])
    capsys.readouterr()
    results = [str(tmp_path / f"tiny-{seed}.json") for seed in (0, 1)]
    assert main(["plot", *results, "--out", str(tmp_path / "figures")]) == 0
    assert str(tmp_path / "figures" / "tpot.png") in capsys.readouterr().out.splitlines()


def test_records_of_the_same_name_are_told_apart(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for folder in ("a", "b"):
        main(["run", str(config), "--out", str(tmp_path / folder), "--no-plots", "--seed", "0"])
        paths.append(str(tmp_path / folder / "tiny-0.json"))
    labels: list[str] = []
    monkeypatch.setattr(plots, "check_plots", lambda: None)
    monkeypatch.setattr(plots, "save_plots", lambda records, folder: labels.extend(records) or [])
    assert main(["plot", *paths, "--out", str(tmp_path)]) == 0
    assert labels == paths


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["run", "none.yaml"], "none.yaml cannot be read: No such file or directory"),
        (
            ["run", "{config}", "--seed", "-1"],
            "seeds are [-1], and must differ, and be from 0",
        ),
        (["run", "{config}", "--seed", "2", "2"], "seeds are [2, 2]"),
        (["plot", "none.json", "--out", "x"], "none.json cannot be read"),
        (["plot", "{config}", "--out", "x"], "tiny.yaml is no record of a run"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    pytest.importorskip("matplotlib")
    assert main([one.format(config=config) for one in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("llumnix-sim: ") and told in error and error.count("\n") == 1


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_a_folder_that_is_none(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(config), "--out", str(config), "--no-plots"]) == 1
    assert "tiny.yaml: File exists" in capsys.readouterr().err


def test_missing_figures_are_told_before_the_run(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert main(["run", str(config), "--out", str(tmp_path / "out")]) == 1
    assert "llumnix[sim]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "simulate", interrupted)
    assert main(["run", str(config)]) == 130


def test_it_starts_without_engine_figures_or_etcd() -> None:
    heavy = ("vllm", "torch", "matplotlib", "tqdm", "pyetcd", "grpc", "pykka", "aiohttp")
    code = (
        "import sys, llumnix.entrypoints.simulate\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
