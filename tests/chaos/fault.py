"""A fault, and what is known of one that has been injected."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.cluster import Arena
from tests.chaos.load import Load


@dataclass
class Deed:
    """A fault that has been injected."""

    what: str  # in words: the target
    heal: Callable[[], None] | None = None
    homes: frozenset[str] = frozenset()  # nodes whose clients may be told an error, or cut off
    at: float = 0.0  # when, on the clock on the wall; 0: at the beginning of the call


Inject = Callable[[Arena, Load, random.Random], Deed]


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    inject: Inject
    detects: str = ""  # what a node says when it has noticed
    hold: float = 0.0  # seconds until it is healed
    within: float = 60.0  # seconds from there until the cluster is whole again
    weight: int = 2  # how often it is chosen at random
