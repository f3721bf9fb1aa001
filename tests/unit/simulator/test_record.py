"""A run as JSON, there and back."""

import gzip
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.simulator.record import Record, encode, read, write
from llumnix.simulator.result import Result
from llumnix.simulator.schema import SimConfigError
from llumnix.simulator.summary import summarize
from tests.kit.results import result, story

CONFIG = {"workload": {"priorities": {-1: 0.1}}}


def recorded(path: Path, run: Result, **options: Any) -> Record:
    write(path, encode(run, summarize(run), config=CONFIG, seed=3, **options))
    return read(path)


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_there_and_back(tmp_path: Path, name: str) -> None:
    run = result()
    record = recorded(tmp_path / name, run, too_long=2)
    assert (record.seed, record.too_long) == (3, 2)
    assert record.config == {"workload": {"priorities": {"-1": 0.1}}}
    assert record.summary["everything"]["requests"] == 4
    assert record.summary["by_priority"]["-1"]["decode"]["mean"] is None
    assert record.summary["moves_failed"] == {"no room": 2, "ended": 1}
    assert record.samples["at"] == [0.0, 5.0, 10.0]
    assert record.samples["fragmented_blocks"] == [10, 30, 0]
    assert [one["prefill"] for one in record.requests] == [1.0, 2.0, 3.0, None]
    assert [one["latency"] for one in record.requests] == [1.2, 2.3, 3.0, None]
    assert [one["decode"] for one in record.requests] == [0.1, 0.3, None, None]
    assert [one["priority"] for one in record.requests] == [0, 0, -1, 0]
    assert record.requests[0]["moves"] == [
        {"at": 1.15, "source": "i0", "destination": "i1", "downtime": 0.02, "blocks": 7}
    ]
    assert record.requests[0]["tokens_us"] == [1_000_000, 100_000, 100_000]
    assert record.requests[3]["tokens_us"] == []


@given(gaps=st.lists(st.floats(0, 100), min_size=1, max_size=30), number=st.integers(0, 10_000))
def test_times_of_tokens_are_right_to_a_microsecond(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[float], number: int
) -> None:
    one = story(number, *gaps)
    path = tmp_path_factory.getbasetemp() / "times.json"
    record = recorded(path, Result([one], [], 1.0, 1.0, 1.0))
    found = [time / 1e6 for time in accumulate(record.requests[0]["tokens_us"])]
    assert found == pytest.approx([time - number for time in one.times], abs=6e-7)


def test_times_of_tokens_may_be_left_out(tmp_path: Path) -> None:
    record = recorded(tmp_path / "run.json", result(), tokens=False)
    assert all("tokens_us" not in request for request in record.requests)


def test_the_same_run_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.json.gz"):
        recorded(tmp_path / name, result())
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_no_samples_and_no_requests(tmp_path: Path) -> None:
    record = recorded(tmp_path / "run.json", Result([], [], 0.0, 0.0, 0.0))
    assert record.samples["at"] == [] and record.requests == []


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("a.json", b"{", "no record of a run"),
        ("a.json", b"[]", "in format 1"),
        ("a.json", b'{"format": 0}', "in format 1"),
        ("a.json", b'{"format": 1}', "lacks seed"),
        ("a.json.gz", b"{}", "no record of a run"),
        ("a.json.gz", gzip.compress(b"{}" * 99)[:20], "no record of a run"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SimConfigError, match=told):
        read(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SimConfigError, match="cannot be read: No such file"):
        read(tmp_path / "a.json")
