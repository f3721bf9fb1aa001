"""What servers that have ended had counted goes on counting, and leaves no file of each of them."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from llumnix.node.api_servers.process_metrics import FOLDER, forget_process, scrape_files


def written(folder: Path, kind: str, pid: int, values: dict[str, float]) -> None:
    """A file as prometheus_client writes it for a process."""
    files: Any = MmapedDict
    file = files(str(folder / f"{kind}_{pid}.db"))
    for label, value in values.items():
        key = json.dumps(["requests", "requests_total", {"kind": label}, "help"])
        file.write_value(key, value, 0.0)
    file.close()


def total(folder: Path) -> dict[str, float]:
    collector: Any = MultiProcessCollector
    registry = CollectorRegistry()
    collector(registry, path=str(folder))
    return {
        sample.labels["kind"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "requests_total"
    }


def test_what_they_have_counted_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    written(tmp_path, "counter", 7, {"a": 1.0})
    for pid in range(100, 120):
        written(tmp_path, "counter", pid, {"a": 2.0, "b": 1.0})
        before = total(tmp_path)
        written(tmp_path, "gauge_livesum", pid, {"a": 5.0})  # of what is no more
        forget_process(pid)
        assert total(tmp_path) == before
    assert total(tmp_path) == {"a": 41.0, "b": 20.0}
    assert {file.name for file in tmp_path.iterdir()} == {"counter_7.db", "counter_0.db", "lock"}


def test_a_scrape_while_servers_end_finds_all_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    pids = range(100, 160)
    for pid in pids:
        written(tmp_path, "counter", pid, {"a": 1.0})
    ending = threading.Thread(target=lambda: [forget_process(pid) for pid in pids])
    ending.start()
    found = set()
    while ending.is_alive():
        found |= set(re.findall(rb'requests_total{kind="a"} (\S+)', scrape_files()))
    ending.join()
    assert found == {b"60.0"}
