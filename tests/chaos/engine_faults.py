"""What an engine dies of: a signal, an exception in a step, no memory, a poisonous prompt."""

import os
import random
import re
import signal

from tests.chaos.cluster import NAMES, START, Arena, later
from tests.chaos.fault import Deed, Fault, Inject
from tests.chaos.load import Load
from tests.chaos.orders import POISON, done

OBEYED = 30.0  # seconds within which an engine has a request, and so takes a step
ANSWERED = 90.0  # seconds for a poisonous request to be given up
# Two; more where newcomers were in the same step, or another server's suspect was there on trial.
GIVEN_UP = re.compile(r"request \S+ is given up, as [2345] engines died while they ran it")
DIED = r"instance \S+ died"


def _signal(number: signal.Signals) -> Inject:
    def inject(arena: Arena, load: Load, draw: random.Random) -> Deed:
        name, pid = _choose(arena, draw)
        os.kill(pid, number)
        return Deed(f"an engine of node {name}, process {pid}")

    return inject


def _all_at_once(arena: Arena, load: Load, draw: random.Random) -> Deed:
    """No instance is left, and each is started again: what runs waits for them."""
    arena.remember()
    pids = [pid for name in NAMES for pid in arena.engines(name).values()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return Deed(f"{len(pids)} engines of {len(NAMES)} nodes")


def _order(what: str) -> Inject:
    def inject(arena: Arena, load: Load, draw: random.Random) -> Deed:
        name, pid = _choose(arena, draw)
        order = arena.orders / str(pid)
        done(order).unlink(missing_ok=True)  # of an earlier process of that number
        order.write_text(what)
        if not later(done(order).exists, OBEYED):
            order.unlink()
            raise RuntimeError(f"the engine of process {pid} took no step in {OBEYED:.0f} s")
        return Deed(f"an engine of node {name}, process {pid}", at=done(order).stat().st_mtime)

    return inject


def _choose(arena: Arena, draw: random.Random) -> tuple[str, int]:
    """A node, and the process of one of its engines."""
    name = draw.choice(NAMES)
    pid = draw.choice(sorted(arena.engines(name).values()))
    arena.remember()
    return name, pid


def _poison(arena: Arena, load: Load, draw: random.Random) -> Deed:
    """A request that ends each engine that runs it; raises unless its client is told so."""
    name = draw.choice(NAMES)
    arena.remember()
    prompt = [*POISON, *(draw.randrange(3, 1000) for _ in range(20))]
    body = {"model": "small", "prompt": prompt, "max_tokens": 50, "temperature": 0}
    answer = arena.nodes[name].post("/v1/completions", body, within=ANSWERED)
    if answer.status != 500 or not GIVEN_UP.search(answer.text):
        raise RuntimeError(f"poison was answered with {answer.status}: {answer.text[:300]}")
    return Deed(f"at node {name}, given up after {answer.seconds:.1f} s")


HUNG = r"instance \S+ (hangs|died)"

ENGINE_FAULTS = (
    Fault("engine SIGKILL", _signal(signal.SIGKILL), DIED, hold=3.0, weight=6),
    Fault("engine SIGTERM", _signal(signal.SIGTERM), DIED, hold=3.0),
    Fault("engine SIGSTOP", _signal(signal.SIGSTOP), HUNG, hold=10.0, weight=3),
    Fault("all engines SIGKILL", _all_at_once, DIED, hold=3.0, within=START, weight=1),
    Fault("engine exception", _order("exception"), DIED, hold=3.0),
    Fault("engine out of memory", _order("memory"), DIED, hold=3.0),
    Fault("engine poisoned", _poison, DIED, hold=5.0),
)
