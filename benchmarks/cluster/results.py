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
    """Several calls, or what was merged before, as one; the same run, knee or call only once.

    Each run keeps the description of its cluster, and each call's command and versions are kept.
    """
    runs: dict[str, Run] = {}
    found: dict[str, list[Any]] = {name: [] for name in ("calls", "knees", "skipped", "costs")}
    for call in calls:
        for run in call["runs"]:
            runs.setdefault(run["id"], {**run, "cluster": run.get("cluster", call.get("cluster"))})
        more = {"calls": [_told(call)], "costs": _costs(call)} | {
            name: call[name] for name in found if name in call
        }
        for name, items in more.items():
            found[name] += [item for item in items if item not in found[name]]
    return {**found, "runs": list(runs.values())}


def _told(call: dict[str, Any]) -> dict[str, Any]:
    """What a call says of itself: all that is no list of results."""
    facts = (key for key in call if key != "cost" and not isinstance(call[key], list))
    return {key: call[key] for key in facts}


def _costs(call: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"cluster": call["cluster"], "ratios": call["cost"]}] if call.get("cost") else []


def _without(run: Run, name: str) -> Run:
    return {key: value for key, value in run.items() if key != name}


def read(files: Sequence[Path]) -> dict[str, Any]:
    """Files of results, merged."""
    return merge([json.loads(file.read_text()) for file in files])


def write(merged: dict[str, Any], file: Path) -> None:
    """Merged results for `read`, without what each request and each look at the engines saw."""
    runs = [_without(run, "samples") for run in merged["runs"]]
    runs = [{**run, "watch": _without(run.get("watch", {}), "looks")} for run in runs]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**merged, "runs": runs}, indent=1) + "\n")
