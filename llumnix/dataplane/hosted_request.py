"""A request as the instance that runs it knows it, and the order in which its engine runs it.

An engine says after each step how many requests it runs, and not which. That follows from how
vLLM's schedulers admit and preempt; what `Order` says is one step old at most.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.cluster import NodeId, kv_blocks
from llumnix.dataplane.frames import News, Submit

# For engines with a scheduler or a worker extension of the operator's own.
NO_RESUME = "its engine has no way to begin with outputs"
TRIAL_TOKENS = 3  # that clear a suspect


def why_pinned(request: EngineCoreRequest) -> str | None:
    """What keeps a request from going on elsewhere once it has outputs; None if nothing does."""
    if request.sampling_params is None:
        return "a pooling request has no tokens to go on from"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "its prompt has no token ids"
    if request.resumable:
        return "its input is still being streamed"
    return None


class Origin(Protocol):
    """An API server that has requests here: this node's own, or one behind a peer link."""

    @property
    def node(self) -> NodeId:
        """The node of that API server."""

    def deliver(self, frame: News, stats: SchedulerStats | None = None) -> None:
        """Hand a frame over without waiting; `stats` only ever go to this node's own."""


@dataclass(slots=True, eq=False)
class HostedRequest:
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
    moving: bool = False  # a migration of it is under way
    preemptions: int = 0  # here
    watcher: asyncio.Future[None] | None = None  # done at its next output, or its end

    @classmethod
    def of(cls, name: str, origin: Origin, frame: Submit, block_size: int) -> "HostedRequest":
        """The request of a frame, which the engine will know by this name."""
        request, generated = frame.request, len(frame.generated)
        prompt = len(request.prompt_token_ids or ())
        return cls(
            request_id=request.request_id,
            name=name,
            origin=origin,
            epoch=frame.epoch,
            prompt=prompt,
            position=generated,
            brought=generated,
            suspect=frame.suspect,
            blocks=kv_blocks(prompt + generated, block_size),
            priority=request.priority,
            arrived=request.arrival_time,
            pinned=why_pinned(request),
        )

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


class Order:
    """The requests of one engine: its batch, and its queue."""

    def __init__(self, by_priority: bool = False) -> None:
        """`by_priority`: whether the engine's queue goes by priority first."""
        self._by_priority = by_priority
        self.queue: list[HostedRequest] = []  # in the order in which they are to run
        self._batch: dict[
            str, HostedRequest
        ] = {}  # by name, in the order in which they were admitted

    def add(self, request: HostedRequest) -> None:
        """It has come. One that brought outputs goes before all that are queued already."""
        self._wait(request, first=request.resumed)

    def remove(self, request: HostedRequest) -> None:
        """It has ended, or gone."""
        if self._batch.pop(request.name, None) is None:
            self.queue.remove(request)

    def clear(self) -> None:
        """All are gone."""
        self.queue, self._batch = [], {}

    def step(self, running: int, answered: Iterable[HostedRequest]) -> None:
        """A step has ended: so many run, among them those that have got something and go on."""
        for request in answered:
            if request.name not in self._batch:
                self.queue.remove(request)
                self._batch[request.name] = request
        while len(self._batch) > running:
            preempted = self._batch.pop(self._least())
            self._wait(preempted, first=True)
        while len(self._batch) < running and self.queue:
            admitted = self.queue.pop(0)
            self._batch[admitted.name] = admitted

    def _least(self) -> str:
        """Who is preempted: the last admitted, or by priority the least urgent."""
        if self._by_priority:
            return max(self._batch, key=lambda name: self._batch[name].urgency())
        return next(reversed(self._batch))

    def _wait(self, request: HostedRequest, first: bool) -> None:
        if self._by_priority:
            self.queue.append(request)
            self.queue.sort(key=HostedRequest.urgency)
        elif first:
            self.queue.insert(0, request)
        else:
            self.queue.append(request)
