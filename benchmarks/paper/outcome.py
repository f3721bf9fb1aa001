"""What is kept of a run: the numbers of each request, and the cluster's over time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llumnix.simulator.result import Result, Sample, Story

Column = NDArray[np.float64]


def _decode(story: Story) -> float:
    return story.decode if len(story.times) > 1 else nan


_OF_STORY: Mapping[str, Callable[[Story], float]] = {
    "at": lambda story: story.job.at,
    "prompt": lambda story: story.job.prompt,
    "output": lambda story: story.job.output,
    "priority": lambda story: story.job.priority,
    "prefill": lambda story: story.prefill,
    "decode": _decode,
    "latency": lambda story: story.latency,
    "loss": lambda story: story.preemption_loss,
    "preemptions": lambda story: story.preemptions,
    "moves": lambda story: len(story.hops),
}


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A run; times in seconds. `decode` is NaN for requests with one token."""

    requests: dict[str, Column]
    samples: dict[str, Column]
    totals: dict[str, float]

    @classmethod
    def of(cls, result: Result) -> "Outcome":
        """The outcome of a run in which every request ended."""
        return cls(
            {key: _column([of(s) for s in result.stories]) for key, of in _OF_STORY.items()},
            {key: _column([getattr(s, key) for s in result.samples]) for key in Sample._fields},
            {
                "seconds": result.seconds,
                "instance_seconds": result.instance_seconds,
                "moves": float(sum(len(story.hops) for story in result.stories)),
                "moves_failed": float(sum(result.moves_failed.values())),
            },
        )

    def save(self, file: Path) -> None:
        """Write it, so that nobody sees half a file."""
        columns = {f"r_{key}": column for key, column in self.requests.items()}
        columns |= {f"s_{key}": column for key, column in self.samples.items()}
        part = file.with_suffix(".part")
        with part.open("wb") as out:
            np.savez_compressed(out, totals=json.dumps(self.totals), **columns)  # type: ignore[arg-type]
        part.rename(file)

    @classmethod
    def load(cls, file: Path) -> "Outcome":
        """Read it back."""
        with np.load(file) as kept:
            return cls(
                {key[2:]: kept[key] for key in kept.files if key.startswith("r_")},
                {key[2:]: kept[key] for key in kept.files if key.startswith("s_")},
                json.loads(str(kept["totals"])),
            )


def _column(values: list[float]) -> Column:
    return np.array(values, dtype=np.float64)
