"""All figures and the page: `python -m benchmarks.paper`, with the options of any figure."""

import sys

from benchmarks.paper import (
    autoscaling,
    fragmentation,
    migration,
    page,
    priorities,
    scalability,
    serving,
)


def main(argv: list[str] | None = None) -> None:
    """One after the other; the rates by the rule are those that are kept."""
    for figure in (migration, serving, fragmentation, priorities, autoscaling, scalability, page):
        figure.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
