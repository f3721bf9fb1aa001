"""What calls of the benchmark have found: written after each run, read and merged for reports."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]


class Results:
    """The file of one call."""

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        self._file = file
        self.data: dict[str, Any] = {**facts, "knees": [], "skipped": [], "runs": []}

    def add(self, run: Run) -> None:
        """One more run."""
        self.data["runs"].append(run)
        self.write()

    def skip(self, sentence: str) -> None:
        """Something that was asked for and not done."""
        self.data["skipped"].append(sentence)
        self.write()

    def write(self) -> None:
        """All at once, so that whoever ends this program leaves a whole file."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".tmp")
        new.write_text(json.dumps(self.data, separators=(",", ":")) + "\n")
        os.replace(new, self._file)


def merge(calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs of several calls, each with its cluster's description; the same run only once."""
    runs: dict[str, Run] = {}
    skipped: list[str] = []
    knees: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    for call in calls:
        for run in call["runs"]:
            runs.setdefault(run["id"], {**run, "cluster": run.get("cluster", call["cluster"])})
        skipped += [one for one in call["skipped"] if one not in skipped]
        knees += [one for one in call["knees"] if one not in knees]
        if ratios := call.get("cost"):
            cost = {"cluster": call["cluster"], "ratios": ratios}
            costs += [cost] if cost not in costs else []
    return {"runs": list(runs.values()), "skipped": skipped, "knees": knees, "costs": costs}


def read(files: Sequence[Path]) -> dict[str, Any]:
    """Files of results, merged."""
    return merge([json.loads(file.read_text()) for file in files])
