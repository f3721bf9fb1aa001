"""Writes the reference of llumnix's own options, docs/options.md, out of llumnix/config.py."""

import dataclasses
import sys
from pathlib import Path

from llumnix.config import option_fields

TARGET = Path(__file__).resolve().parent.parent / "docs" / "options.md"
HEAD = """\
# Options

llumnix's own options, beside which the server takes all of vLLM's. Each can be given on the command
line, by its environment variable, or in a YAML file named by `--config` (keys as the options,
without the dashes); the command line counts before the environment, the environment before the
file. `--print-config` shows the result, `--validate-config` checks it.

`make docs` writes this page out of `llumnix/config.py`.

| option | environment | default | meaning |
|---|---|---|---|
"""


def page() -> str:
    """The page as it should be."""
    return HEAD + "".join(_row(one) for one in option_fields())


def _row(one: dataclasses.Field[object]) -> str:
    default = "" if one.default in (None, "") else f"`{one.default}`"
    meaning = str(one.metadata["help"]).replace("|", "\\|")
    option = f"--{one.name.replace('_', '-')}"
    return f"| `{option}` | `LLUMNIX_{one.name.upper()}` | {default} | {meaning} |\n"


def main() -> int:
    """Write the page; with --check, only say whether it is up to date."""
    if "--check" in sys.argv[1:]:
        if TARGET.is_file() and TARGET.read_text() == page():
            return 0
        print(f"{TARGET} is out of date: run `make docs`", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(page())
    print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
