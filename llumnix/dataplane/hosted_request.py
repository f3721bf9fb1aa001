"""A request as the instance that runs it knows it, and the API server it came from."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from vllm.v1.metrics.stats import SchedulerStats

from llumnix.cluster import NodeId
from llumnix.dataplane.frames import News

TRIAL_TOKENS = 3  # that clear a suspect


class Origin(Protocol):
    """An API server that has requests here: this node's own, or one behind a peer link."""

    @property
    def node(self) -> NodeId:
        """The node of that API server."""

    def deliver(self, frame: News, stats: SchedulerStats | None = None) -> None:
        """Hand a frame over without waiting; `stats` only ever go to this node's own."""


@dataclass(slots=True, eq=False)
class Tenant:
    """One request of an instance, in one epoch."""

    request_id: str
    name: str  # by which the engine knows it in this epoch
    origin: Origin
    epoch: int
    prompt: int  # tokens
    position: int  # of the next output token
    blocks: int  # KV blocks that its tokens asked for when it came
    priority: int  # vLLM's: the lower, the sooner
    arrived: float  # at its API server, in seconds since the epoch
    pinned: str | None  # why it can't move once it has outputs
    brought: int  # outputs that it came with
    suspect: bool = False  # it may be what has killed its engines
    started: bool = False
    leaving: bool = False  # a migration of it is under way
    preemptions: int = 0  # here
    watcher: asyncio.Future[None] | None = None  # done at its next output, or its end

    @property
    def resumed(self) -> bool:
        """Whether it came with outputs."""
        return self.brought > 0

    @property
    def on_trial(self) -> bool:
        """Whether it may still kill this engine: what does, does it in its first steps there."""
        return self.suspect and self.position - self.brought < TRIAL_TOKENS

    def urgency(self) -> tuple[int, float, str]:
        """Its place in a queue that goes by priority, as vLLM sorts it."""
        return self.priority, self.arrived, self.request_id

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and the outputs so far."""
        return self.prompt + self.position

    @property
    def stuck(self) -> str | None:
        """Why it can't go on elsewhere; None if it can."""
        return self.pinned if self.position else None

    def wake(self) -> None:
        """Tell whoever waits for an output."""
        watcher, self.watcher = self.watcher, None
        if watcher is not None and not watcher.done():
            watcher.set_result(None)
