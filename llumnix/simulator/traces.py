"""Readers of traces: requests that were recorded, from public files."""

import csv
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import orjson

from llumnix.simulator.schema import SimConfigError

MOONCAKE_BLOCK = 512  # tokens for each of its hash_ids; the last may stand for fewer


class Recorded(NamedTuple):
    """One request of a trace."""

    at: float  # seconds from the trace's first request; 0 in traces without times
    prompt: int  # tokens
    output: int  # tokens
    hashes: tuple[int, ...] = ()  # of the prompt's blocks
    block: int = 0  # tokens in each of these


class Format(NamedTuple):
    """How a kind of trace is read, and whether it has times."""

    read: Callable[[str], list[Recorded]]
    timed: bool


def read_azure(file: str) -> list[Recorded]:
    """Azure's LLM inference traces: a CSV of TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises:
        SimConfigError: the file cannot be read, or is none of these.
    """
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    found = []
    for number, (stamp, prompt, output) in _rows(file, columns):
        try:
            # Its seventh decimal is more than fromisoformat is bound to take.
            seconds = datetime.fromisoformat(stamp[:26]).replace(tzinfo=UTC).timestamp()
        except ValueError as error:
            raise SimConfigError(f"{file}, line {number}: {stamp!r} is no time") from error
        lengths = _tokens(file, number, prompt), _tokens(file, number, output)
        found.append(Recorded(seconds, *lengths))
    return _from_zero(found)


def read_mooncake(file: str) -> list[Recorded]:
    """Mooncake's traces: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

    Raises:
        SimConfigError: the file cannot be read, or is none of these.
    """
    found = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = orjson.loads(line)
            hashes = tuple(int(name) for name in row["hash_ids"])
            seconds, prompt = row["timestamp"] / 1000, int(row["input_length"])
            output = int(row["output_length"])
        except (ValueError, KeyError, TypeError) as error:
            raise SimConfigError(f"{file}, line {number} is no request of Mooncake's") from error
        found.append(Recorded(seconds, prompt, output, hashes, MOONCAKE_BLOCK))
    return _from_zero(found)


def read_lengths(file: str) -> list[Recorded]:
    """A CSV of input_tokens and output_tokens, without times.

    Raises:
        SimConfigError: the file cannot be read, or is none of these.
    """
    pairs = read_columns(file, ("input_tokens", "output_tokens"))
    return [Recorded(0.0, prompt, output) for prompt, output in pairs]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "azure": Format(read_azure, timed=True),
        "mooncake": Format(read_mooncake, timed=True),
        "lengths": Format(read_lengths, timed=False),
    }
)


def read_columns(file: str, columns: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Columns of a CSV file as whole numbers.

    Raises:
        SimConfigError: the file cannot be read, is empty, lacks a column, or has no number in it.
    """
    rows = _rows(file, columns)
    found = [tuple(_tokens(file, number, cell) for cell in row) for number, row in rows]
    if not found:
        raise SimConfigError(f"{file} has no rows")
    return found


def _rows(file: str, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """The named columns of each row, with the number of its line."""
    reader = csv.DictReader(_lines(file))
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise SimConfigError(f"{file} has no column {missing[0]}")
        for row in reader:
            yield reader.line_num, [row[column] or "" for column in columns]
    except csv.Error as error:
        raise SimConfigError(f"{file}, line {reader.line_num + 1} is no CSV: {error}") from error


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SimConfigError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SimConfigError(f"{file} is no text") from error


def _tokens(file: str, number: int, cell: str) -> int:
    try:
        tokens = int(cell)
    except ValueError as error:
        raise SimConfigError(f"{file}, line {number}: {cell!r} is no number of tokens") from error
    if abs(tokens) >= 2**31:
        raise SimConfigError(f"{file}, line {number}: {cell} tokens are too many")
    return tokens


def _from_zero(found: list[Recorded]) -> list[Recorded]:
    """By time, the first at 0."""
    found.sort(key=lambda one: one.at)
    return [one._replace(at=one.at - found[0].at) for one in found]
