"""The processes of a node that does nothing: a fork server, an engine core and its worker.

    python -m tests.kit.family [--import-slowly]

prints their process ids as JSON, the engine core's and its worker's last, and then waits.
"""

import json
import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import Connection

from llumnix.engine.vllm.processes import launcher
from llumnix.engine.vllm.processes.parent_death import end_with_node

LATE = "tests.kit.late"  # takes long to import, and long to end


def _wait() -> None:
    threading.Event().wait()


def _engine(tell: Connection) -> None:
    os.setpgid(0, 0)
    end_with_node()
    worker = multiprocessing.get_context("fork").Process(target=_wait)
    worker.start()
    tell.send([os.getpid(), worker.pid])
    _wait()


def main() -> None:
    """Start them all, and say which they are."""
    slowly = "--import-slowly" in sys.argv
    os.environ["LATE_SECONDS"] = "60" if slowly else "0"
    launcher._PRELOAD = [launcher._PRELOAD[0], LATE]
    context = launcher.start_fork_server()
    pids: list[int] = []
    if not slowly:
        ear, mouth = context.Pipe()
        context.Process(target=_engine, args=(mouth,)).start()
        pids = ear.recv()
    print(json.dumps(pids), flush=True)
    _wait()


if __name__ == "__main__":
    main()
