"""A run as a JSON file, written and read back; gzipped if the name ends in .gz.

    format           1
    version          of llumnix
    seed, config     what was run: the seed, and the content of the configuration file
    too_long         requests that were cut or resampled to `max_tokens`
    summary          the fields of `summary.Summary`; null where there is nothing to average
    samples          a list for each field of `result.Sample`, all equally long
    requests         an object for each request, in the order of arrival:
        number, arrival, prompt, output, priority, instance, ended
        prefill, decode, latency     of `result.Story`; null as long as it is not known
        preemptions, preemption_loss
        moves                        objects with the fields of `result.Hop`
        tokens_us                    when each token came, if it was asked for: whole microseconds,
                                     the first from the arrival, each other from the one before

All other times are seconds, from the beginning of the run or of the request, to the microsecond.
The gaps in `tokens_us` are differences of rounded times, so that their sums stay exact. Infinities
of a configuration are null, as JSON has none.
"""

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from llumnix import __version__
from llumnix.simulator.result import Hop, Result, Sample, Story
from llumnix.simulator.schema import SimConfigError
from llumnix.simulator.summary import Summary

FORMAT = 1
_DECIMALS = 6

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """A run that was read back; its parts are as in the file."""

    seed: int
    config: Row
    too_long: int
    summary: Row
    samples: dict[str, list[float]]
    requests: list[Row]


def encode(
    result: Result,
    summary: Summary,
    *,
    config: Mapping[str, Any],
    seed: int,
    too_long: int = 0,
    tokens: bool = True,
) -> bytes:
    """A run as JSON; without the time of every token unless `tokens`."""
    columns = zip(*result.samples, strict=True) if result.samples else [()] * len(Sample._fields)
    record = {
        "format": FORMAT,
        "version": __version__,
        "seed": seed,
        "too_long": too_long,
        "summary": summary,
        "config": config,
        "samples": dict(zip(Sample._fields, columns, strict=True)),
        "requests": [_request(story, tokens) for story in result.stories],
    }
    # Priorities are keys that are numbers.
    return orjson.dumps(record, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)


def write(path: Path, encoded: bytes) -> None:
    """Write a run. Raises OSError."""
    if path.suffix == ".gz":
        encoded = gzip.compress(encoded, mtime=0)  # the same run, the same bytes
    path.write_bytes(encoded)


def read(path: Path) -> Record:
    """Read a run back.

    Raises:
        SimConfigError: it cannot be read, or is none.
    """
    try:
        content = path.read_bytes()
        found = orjson.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (gzip.BadGzipFile, EOFError, orjson.JSONDecodeError) as error:
        raise SimConfigError(f"{path} is no record of a run: {error}") from error
    except OSError as error:
        raise SimConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise SimConfigError(f"{path} is no record of a run in format {FORMAT}")
    names = [one.name for one in fields(Record)]
    for name in names:
        if name not in found:
            raise SimConfigError(f"{path} is no whole record of a run: it lacks {name}")
    return Record(**{name: found[name] for name in names})


def _request(story: Story, tokens: bool) -> Row:
    job, ended = story.job, story.ended
    row: Row = {
        "number": job.number,
        "arrival": _rounded(job.at),
        "prompt": job.prompt,
        "output": job.output,
        "priority": job.priority,
        "instance": story.instance,
        "ended": ended,
        "prefill": _rounded(story.prefill) if story.times else None,
        "decode": _rounded(story.decode) if ended and len(story.times) > 1 else None,
        "latency": _rounded(story.latency) if ended else None,
        "preemptions": story.preemptions,
        "preemption_loss": _rounded(story.preemption_loss),
        "moves": [_move(hop) for hop in story.hops],
    }
    if tokens:
        row["tokens_us"] = _gaps(story.times, job.at)
    return row


def _move(hop: Hop) -> Row:
    return hop._asdict() | {"at": _rounded(hop.at), "downtime": _rounded(hop.downtime)}


def _gaps(times: Sequence[float], start: float) -> Any:
    microseconds = np.rint((np.asarray(times) - start) * 1e6).astype(np.int64)
    return np.diff(microseconds, prepend=0)


def _rounded(seconds: float) -> float:
    return round(seconds, _DECIMALS)
