"""The first lines of real traces, and files that are none."""

from pathlib import Path

import pytest

from llumnix.simulator.schema import SimConfigError
from llumnix.simulator.traces import FORMATS, Recorded, read_azure, read_lengths, read_mooncake

DATA = Path(__file__).parent / "data"


def test_azure() -> None:
    found = read_azure(str(DATA / "azure.csv"))
    assert len(found) == 11
    assert found[0] == Recorded(0.0, 374, 44)
    assert found[1].at == pytest.approx(4.314579)
    assert found[1][1:3] == (396, 109)


def test_a_field_that_is_no_number_of_tokens_but_a_book(tmp_path: Path) -> None:
    file = tmp_path / "dump.csv"
    file.write_text("input_tokens,output_tokens\n" + "a" * 140_000 + ",1\n")
    with pytest.raises(SimConfigError, match=r"dump.csv, line 2 is no CSV: field larger than"):
        read_lengths(str(file))


def test_mooncake() -> None:
    found = read_mooncake(str(DATA / "mooncake.jsonl"))
    assert found[0] == Recorded(0.0, 6758, 500, tuple(range(14)), 512)
    assert all(len(one.hashes) == -(-one.prompt // 512) for one in found)
    assert found[-1].at == 3.0


def test_lengths() -> None:
    found = read_lengths(str(DATA / "lengths.csv"))
    assert found[:2] == [Recorded(0.0, 34, 244), Recorded(0.0, 17, 71)]


def test_requests_come_in_order_of_time(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:47.5000000,2,2\n2023-11-16 18:15:46.0000000,1,1\n"
    )
    assert read_azure(str(file)) == [Recorded(0.0, 1, 1), Recorded(1.5, 2, 2)]


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_file_is_one_sentence(name: str) -> None:
    with pytest.raises(SimConfigError, match=r"^nowhere\.csv cannot be read: No such file"):
        FORMATS[name].read("nowhere.csv")


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("azure", "a,b\n1,2\n", "no column TIMESTAMP"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,2\n", "line 2: 'noon'"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:47,x,2\n", "'x'"),
        ("mooncake", "[]\n", "line 1 is no request"),
        ("mooncake", "{", "line 1 is no request"),
        ("lengths", "input_tokens,output_tokens\n1\n", "line 2: ''"),
        ("lengths", "input_tokens,output_tokens\n", "no rows"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, name: str, text: str, told: str) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(SimConfigError, match=told):
        FORMATS[name].read(str(file))
