"""Sees that a node's actors live: starts them again, or gives the node up."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pykka

from llumnix.actors.base import ASK_SECONDS, A, Actor, Handle
from llumnix.actors.supervised import Supervised

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.1


class Supervision:
    """The actors of a node in the order in which they were started; lives on its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, give_up: Callable[[str], None]) -> None:
        self._loop = loop
        self._give_up = give_up  # called once, with a sentence: the node has to end
        self._actors: list[Supervised[Any]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._gave_up = ""
        self._look()

    def keep(
        self,
        start: Callable[[], pykka.ActorRef[A]],
        inform: Callable[[Handle[A]], None] = lambda actor: None,
    ) -> Supervised[A]:
        """Start an actor and keep it alive from now on; see Supervised."""
        actor = Supervised(start, inform)
        actor.ask(Actor.ping).get(timeout=ASK_SECONDS)
        self._actors.append(actor)
        return actor

    @property
    def fault(self) -> str:
        """Why the node had to be given up; empty if it was not."""
        return self._gave_up

    def give_up(self, fault: str) -> None:
        """Have the node end, cleanly, for that reason."""
        if not self._gave_up:
            self._gave_up = fault
            logger.critical("%s, so this node leaves", fault)
            self._give_up(fault)

    def stop(self) -> None:
        """End all actors, the last one first; blocks for ASK_SECONDS for each that is blocked."""
        if self._timer is not None:
            self._timer.cancel()
        for actor in reversed(self._actors):
            try:
                actor.stop(ASK_SECONDS)
            except pykka.Timeout:  # as when etcd is silent; its thread ends with the process
                logger.warning("%s has not ended within %g s", actor.name, ASK_SECONDS)

    def _look(self) -> None:
        for actor in self._actors:
            if actor.alive or actor.hopeless:
                continue
            actor.start_again()  # the last one too, by which the node drains
            if actor.hopeless:
                self.give_up(f"{actor.name} dies again and again")
        self._timer = self._loop.call_later(LOOK_SECONDS, self._look)
