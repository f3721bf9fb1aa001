"""JSON files of results."""

import json
from pathlib import Path
from typing import Any


def write(content: Any, folder: Path, name: str) -> Path:
    """Write a result; the same content gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return file


def read(folder: Path, name: str) -> Any:
    """A result, or None if there is none."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
