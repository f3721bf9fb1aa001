"""Processes that must not outlive their node: each ends at once when the one above it does.

A chain: the node starts a fork server, which forks engine cores, which fork their workers. The
kernel kills each when the thread that started it ends, also one that is stopped, or that hangs with
the interpreter in its hands; so that thread must live as long. Linux alone does so; elsewhere there
are the pipes between them.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import connection

PARENT = "LLUMNIX_PARENT"  # the node's process id, in the environment of its fork server
_PR_SET_PDEATHSIG = 1

_forked_by_main = False


def end_with_parent(parent: int | None = None) -> None:
    """Be killed when the thread that started this process ends; at once if it is not `parent`'s."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_node() -> None:
    """End with the node, in an engine core: this process, and what it will have forked."""
    end_with_parent()
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
    threading.Thread(target=_end_group_with_node, name="parent-watch", daemon=True).start()


def _before_fork() -> None:
    global _forked_by_main
    _forked_by_main = threading.current_thread() is threading.main_thread()


def _after_fork() -> None:
    # Another thread than the main one may well end before its child has done its work.
    if _forked_by_main:
        end_with_parent()


def _end_group_with_node() -> None:
    """Workers, and whatever else has been started, are of the engine core's process group."""
    node = multiprocessing.parent_process()
    if node is not None:
        connection.wait([node.sentinel])
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
