"""Writes the table of routes in docs/security.md out of llumnix/server/door/routes.py."""

import sys
from pathlib import Path

from llumnix.server.door.routes import ROUTES, Access

TARGET = Path(__file__).resolve().parent.parent / "docs" / "security.md"
BEGIN = "<!-- `make docs` writes the table out of llumnix/server/door/routes.py -->\n"
END = "<!-- end of the table -->\n"
WHO = {
    Access.PUBLIC: "public: anybody",
    Access.INFERENCE: "inference: clients and operators",
    Access.OPERATOR: "operators",
    Access.PEER: "nodes, which prove themselves on it",
}


def table() -> str:
    """The table as it should be."""
    rows = [f"| {WHO[access]} | {_cell(ROUTES[access])} |\n" for access in Access]
    return "\n| for | routes |\n|---|---|\n" + "".join(rows) + "\n"


def _cell(paths: tuple[str, ...]) -> str:
    return " ".join(f"`{path}`" for path in sorted(paths))


def page() -> str:
    """The page with the table as it should be."""
    text = TARGET.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{TARGET} has no place for the table of routes")
    return before + begin + table() + end + after


def main() -> int:
    """Write the page."""
    TARGET.write_text(page())
    print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
