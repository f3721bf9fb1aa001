"""Tests that are coroutines, each on a loop of its own that it must leave clean."""

import asyncio
import functools
import gc
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

from llumnix.engine.vllm.processes.socket_folder import scratch
from tests.kit.wait import eventually

LONGEST = 120.0  # seconds; a test that hangs fails


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs the test on a new loop; fails it if tasks or descriptors are left behind, and if
    anything failed that nobody waited for."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        _leave_modules_out()
        before = descriptors()
        failures: list[dict[str, Any]] = []
        with asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(lambda _, context: failures.append(context))
            runner.run(_whole(test(*args, **kwargs)))
            gc.collect()  # a task tells when it is collected that nobody has seen its exception
        assert not failures, failures
        eventually(lambda: not descriptors() - before, within=15)

    return run


@functools.cache
def _leave_modules_out() -> None:
    """Spare each collection the million objects that vLLM's modules are made of."""
    gc.collect()
    gc.freeze()
    scratch()  # which a process has from its first engine on, locked until it ends


async def _whole(test: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(LONGEST):
        await test
    await soon(lambda: asyncio.all_tasks() == {asyncio.current_task()}, within=15)


async def soon(predicate: Callable[[], object], within: float = 20.0) -> float:
    """Lets the loop run until `predicate` is true and returns the seconds that took; fails if a
    look that began `within` seconds or later finds it false."""
    began = time.monotonic()
    while True:
        looked = time.monotonic() - began
        if predicate():
            return time.monotonic() - began
        assert looked < within, f"still not so after {looked:.1f} s"
        await asyncio.sleep(0.002)


def descriptors() -> set[tuple[str, str]]:
    """This process's open descriptors, and what each of them is."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:
            continue  # the one that lists them
    return found
