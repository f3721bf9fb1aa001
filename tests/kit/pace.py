"""A modelled engine's time: steps end when a test lets them, or when a migration waits for one."""

import asyncio

from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import HostedRequest
from tests.kit.loop import soon
from tests.kit.mesh import Gate


class Pace(Gate):
    """A gate through which an engine also steps while anyone waits for its next output.

    So a migration never waits in vain, and the request is where the test has left it otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left = 0
        self._wanted = 0
        self._changed = asyncio.Event()

    def let(self, steps: int) -> None:
        """Let so many steps end."""
        self._left += steps
        self._changed.set()

    async def step(self) -> None:
        """Let one step end, and no second one before it has."""
        self.let(1)
        await soon(lambda: not self._left)

    def open(self) -> None:
        """Let all steps end from now on."""
        self._open = True
        self._changed.set()

    def close(self) -> None:
        """Let no step end any more, except those that are let."""
        self._open = False

    def follow(self, hosted: HostedInstance) -> None:
        """Step while a migration waits for an output of this instance."""
        wait = hosted.next_output

        async def next_output(held: HostedRequest, within: float) -> None:
            self._wanted += 1
            self._changed.set()
            try:
                await wait(held, within)
            finally:
                self._wanted -= 1

        hosted.next_output = next_output  # type: ignore[method-assign]

    async def _sleep(self, seconds: float) -> None:
        self.waiting += 1
        try:
            while not (self._open or self._wanted or self._left):
                self._changed.clear()
                await self._changed.wait()
        finally:
            self.waiting -= 1
        if self._left:
            self._left -= 1
        await asyncio.sleep(0)
