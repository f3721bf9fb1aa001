"""What the user sees while it runs: a bar where tqdm and a terminal are, and lines."""

import sys
import time
from pathlib import Path
from typing import Any


class Progress:
    """Lines go to the terminal and to a log file."""

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._began = time.monotonic()
        self._bar: Any = None
        log.write_text("")

    def expect(self, runs: int) -> None:
        """So many runs are to come."""
        if not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=runs, unit="run")

    def step(self) -> None:
        """One run is over."""
        if self._bar is not None:
            self._bar.update(1)

    def say(self, line: str) -> None:
        """One line, with the seconds since the beginning."""
        line = f"{time.monotonic() - self._began:7.1f}  {line}"
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)
        self.note(line)

    def note(self, line: str) -> None:
        """One line for the log alone."""
        with self._log.open("a") as log:
            log.write(line + "\n")

    def close(self) -> None:
        """No more runs."""
        if self._bar is not None:
            self._bar.close()
