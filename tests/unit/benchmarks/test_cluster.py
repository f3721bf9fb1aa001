"""The cluster benchmark as it is called, with modelled engines."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("psutil")

import psutil

from benchmarks.cluster import plot, process
from benchmarks.cluster.__main__ import main
from benchmarks.cluster.engines import Engines
from benchmarks.cluster.process import Part, Process, StartError, end_all, free_ports
from benchmarks.cluster.systems import KNOWN, Absent, layout, parse
from tests.kit.wait import eventually


@pytest.mark.cluster
def test_a_system_is_started_loaded_and_ended(model: str, tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    options = ["--engine", "sim", "--instances", "2", "--max-model-len", "512"]
    options += [
        "--kv-blocks",
        "200",
        "--systems",
        "--system",
        "ours=--dispatch-policy queue",
        "--shapes",
        "fixed:40,20",
    ]
    options += ["--rates", "20", "--seconds", "3", "--seeds", "4", "--warmup", "0.5"]
    options += ["--watch", "0.5", "--drain", "20", "--clients", "2"]
    main(["--model", model, "--out", str(tmp_path), *options])
    assert set(psutil.Process().children(recursive=True)) <= before
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["skipped"] == []
    (run,) = found["runs"]
    figures = run["figures"]
    assert (run["system"], run["rate"], run["seed"]) == ("ours", 20.0, 4)
    assert (figures["requests"], figures["failed"], figures["unfinished"]) == (60, 0, 0)
    assert figures["tokens"] == 60 * 20
    assert 0 < figures["ttft"]["p50"] <= figures["ttft"]["p99"] < figures["e2e"]["max"]
    assert run["server"]["preemptions"] == 0 and run["server_cpu_seconds"] > 0
    assert len(run["watch"]["looks"]) >= 3
    assert len(run["watch"]["looks"][0][1]) == 2  # engines
    assert len(list(tmp_path.iterdir())) <= 8
    assert "| 20 | ours | 1 |" in (tmp_path / "table.md").read_text()
    assert "20/s seed 4: TTFT" in (tmp_path / "log.txt").read_text()


def test_without_time_nothing_is_started_and_that_is_said(model: str, tmp_path: Path) -> None:
    main(["--model", model, "--engine", "sim", "--budget", "0", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["runs"] == []
    assert found["skipped"][0] == "llumnix-queue, seeds [1, 2, 3]: the time was over."
    assert "Not done" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--systems", "llama"], "and not llama"),
        (["--systems", "llumnix", "--system", "llumnix=-x"], "the same name"),
        (["--system", "llumnix"], "is not NAME=ARGS"),
        (["--reference", "vllm"], "no system has that name"),
        (["--shapes", "X-L"], "is no shape"),
        (["--engine", "sim", "--gpus", "1"], "there are 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "m", "--out", str(tmp_path), *options])
    assert sentence in capsys.readouterr().err


def test_each_system_has_its_own_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    config = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    extra = ("--enforce-eager",)
    engines = Engines(str(tmp_path), instances=8, gpus=2, kv_blocks=851, extra=extra)
    found = layout(KNOWN["llumnix-queue"], engines)
    assert not isinstance(found, Absent)
    command = " ".join(found.front.command)
    assert "--initial-instances 8" in command and "--gpu-memory-utilization 0.22" in command
    assert f"--kv-cache-memory-bytes {851 * 16 * 512 * 1024} " in command  # 512 KiB a token
    assert command.endswith("--dispatch-policy queue --no-migration")
    assert found.front.instances == 8
    assert found.front.environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    one = layout(KNOWN["llumnix"], replace(engines, instances=2, gpus=1))
    assert not isinstance(one, Absent)
    assert one.front.environment["CUDA_VISIBLE_DEVICES"] == "4"
    assert isinstance(layout(KNOWN["vllm-dp"], engines), Absent)
    variant = parse("x@llumnix-rr=--migration-interval 0.5")
    assert variant.arguments[-2:] == ("--migration-interval", "0.5") and "rr" in variant.arguments


def test_a_router_has_a_server_for_each_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm_router")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    found = layout(KNOWN["vllm-router-p2c"], Engines("7b", instances=3, gpus=2))
    assert not isinstance(found, Absent)
    workers, (router,) = found.groups
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in workers] == ["4", "5", "4"]
    assert all(one.url in router.command for one in workers)
    assert len({one.port for one in (*workers, router)}) == 4


def test_plots_come_from_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    spread = {"mean": 0.1, "p50": 0.1, "p99": 0.3, "max": 0.4}
    names = ("ttft", "tpot", "gap", "e2e")
    figures = dict.fromkeys(names, spread) | {"failed": 0, "unfinished": 0}
    server = {"preemptions": 0, "moves": {}, "move_seconds": {}}
    runs = [
        {"id": f"{n}", "system": "llumnix", "shape": "M-M", "cv": 1.0, "rate": 5.0 + n, "seed": 1}
        | {"figures": figures | {"tokens_per_second": 1.0}, "server": server}
        | {"server_cpu_seconds": 1.0, "took": 2.0}
        for n in range(2)
    ]
    files = []
    for run in runs:
        files.append(tmp_path / f"{run['id']}.json")
        call = {"cluster": "c", "runs": [run], "skipped": [], "knees": []}
        files[-1].write_text(json.dumps(call))
    table, png = tmp_path / "table.md", tmp_path / "plots.png"
    arguments = [*map(str, files), "--table", str(table), "--png", str(png)]
    monkeypatch.setattr("sys.argv", ["plot", *arguments])
    plot.main()
    assert "| 5 | llumnix | 1 | 100 |" in table.read_text()
    assert "| 6 | llumnix |" in table.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")


def part(program: str) -> Part:
    (port,) = free_ports(1)
    return Part("one", [sys.executable, "-c", program], port)


def test_a_server_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    one = Process(part("print('no GPU'); raise SystemExit(3)"), tmp_path)
    with pytest.raises(StartError, match=r"ended with 3:\nno GPU"):
        one.wait_ready(time.monotonic() + 60)
    end_all([one])


def test_a_server_that_will_not_end_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_TERM_SECONDS", 0.2)
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); print('here', flush=True); "
    child = f"{stubborn} import time; time.sleep(60)"
    parent = f"{stubborn} import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    before = set(psutil.Process().children(recursive=True))
    one = Process(part(parent), tmp_path)
    eventually(lambda: one.tail(9).count("here") == 2)
    with pytest.raises(StartError, match="not ready in time"):
        one.wait_ready(time.monotonic())
    assert len(set(psutil.Process().children(recursive=True)) - before) == 2
    end_all([one])
    assert set(psutil.Process().children(recursive=True)) <= before
