"""All figures and the page: `python -m benchmarks.paper`, with the options of any figure."""

import sys

from benchmarks.paper import (
    autoscaling,
    comparison,
    fragmentation,
    migration,
    page,
    priorities,
    saturation,
    scalability,
    serving,
)

FIGURES = (
    migration,
    serving,
    comparison,
    saturation,
    fragmentation,
    priorities,
    autoscaling,
    scalability,
)


def main(argv: list[str] | None = None) -> None:
    """One after the other; the rates by the rule are those that are kept."""
    for figure in (*FIGURES, page):
        figure.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
