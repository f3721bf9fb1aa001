"""The faults of nodes, etcd and the network: how each is injected and healed."""

import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial

from tests.chaos.cluster import ETCD, NAMES, PREFIX, SERVERS, START, Arena, later
from tests.chaos.engine_faults import ENGINE_FAULTS
from tests.chaos.fault import Deed, Fault, Inject
from tests.chaos.load import Load
from tests.kit.proxy import Link

LEAVE = 12.0  # seconds that clients get to leave a node that is to be killed


def _leave(load: Load, *names: str) -> None:
    """Have the clients leave these nodes, as a balancer does before a node is taken away."""
    load.avoid = frozenset(names)
    later(lambda: sum(map(load.homes, names)) <= 1, LEAVE)


# ---- nodes ----


def _kill_node(arena: Arena, load: Load, name: str) -> Deed:
    _leave(load, name)
    at = time.time()
    arena.kill(name)
    return Deed(f"node {name}", lambda: void(arena.start(name)), frozenset({name}), at)


def _freeze_node(arena: Arena, load: Load, name: str) -> Deed:
    _leave(load, name)
    at = time.time()
    arena.nodes[name].signal(signal.SIGSTOP)
    heal = partial(arena.nodes[name].signal, signal.SIGCONT)
    return Deed(f"node {name}", heal, frozenset({name}), at)


def void(_: object) -> None:
    """Forget a result."""


def _restart(arena: Arena, load: Load, name: str) -> str:
    """SIGTERM, and a new node of that name when it has ended; how it ended."""
    load.avoid = frozenset({name})
    node = arena.nodes[name]
    arena.remember()
    node.signal(signal.SIGTERM)
    node.process.join(90.0)
    said = f"{name}: {node.process.exitcode}"
    if node.process.exitcode is None:
        arena.kill(name)
    arena.start(name)
    return said


def _terminate_node(arena: Arena, load: Load, draw: random.Random) -> Deed:
    return Deed("exit status of node " + _restart(arena, load, draw.choice(NAMES)))


def _rolling_restart(arena: Arena, load: Load, draw: random.Random) -> Deed:
    said = []
    for name in draw.sample(NAMES, len(NAMES)):
        said.append(_restart(arena, load, name))
        if missing := arena.whole(START):
            said.append(missing)
    return Deed("exit statuses of nodes " + ", ".join(said))


def _leader(deed: Callable[[Arena, Load, str], Deed]) -> Inject:
    return lambda arena, load, draw: deed(arena, load, arena.leader() or draw.choice(NAMES))


def _any_node(deed: Callable[[Arena, Load, str], Deed]) -> Inject:
    return lambda arena, load, draw: deed(arena, load, draw.choice(NAMES))


def _kill_api_servers(arena: Arena, load: Load, draw: random.Random) -> Deed:
    """One, or all: then who connects waits for one that is started again."""
    name = draw.choice(sorted(SERVERS))
    running = arena.api_servers(name)
    victims = running if draw.random() < 0.3 else draw.sample(running, min(1, len(running)))
    arena.remember()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return Deed(f"{len(victims)} of node {name}'s", homes=frozenset({name}))


# ---- etcd ----


def _kill_member(arena: Arena, load: Load, draw: random.Random) -> Deed:
    member = draw.randrange(3)
    arena.etcd.kill(member)
    return Deed(f"etcd member {member}", arena.etcd.heal)


def _freeze_member(arena: Arena, load: Load, draw: random.Random) -> Deed:
    member = draw.randrange(3)
    arena.etcd.freeze(member)
    return Deed(f"etcd member {member}", arena.etcd.heal)


def _freeze_etcd_leader(arena: Arena, load: Load, draw: random.Random) -> Deed:
    member = arena.etcd.leader()
    arena.etcd.freeze(member)
    return Deed(f"etcd member {member}", arena.etcd.heal)


def _lose_quorum(arena: Arena, load: Load, draw: random.Random) -> Deed:
    members = draw.sample(range(3), 2)
    for member in members:
        arena.etcd.kill(member)
    return Deed(f"etcd members {members}", arena.etcd.heal)


def _restart_members(arena: Arena, load: Load, draw: random.Random) -> Deed:
    for member in range(3):
        arena.etcd.restart(member)
    return Deed("all etcd members", arena.etcd.heal)


def _wipe(arena: Arena, load: Load, draw: random.Random) -> Deed:
    for member in range(3):
        arena.etcd.kill(member)
    for member in range(3):
        arena.etcd.restart(member, wipe=True)
    return Deed("all etcd members' data, users and all", arena.etcd.heal)


def _revoke(arena: Arena, load: Load, draw: random.Random) -> Deed:
    name = draw.choice(NAMES)
    fields = arena.etcd.ctl("get", f"{PREFIX}nodes/{name}", "--write-out=fields")
    (lease,) = [li for li in fields.splitlines() if li.startswith('"Lease"')]
    arena.etcd.ctl("lease", "revoke", f"{int(lease.split()[-1]):x}")
    return Deed(f"the lease of node {name}")


def _compact(arena: Arena, load: Load, draw: random.Random) -> Deed:
    fields = arena.etcd.ctl("get", "x", "--write-out=fields")
    (line,) = [li for li in fields.splitlines() if li.startswith('"Revision"')]
    arena.etcd.ctl("compact", line.split()[-1])
    return Deed(f"revision {line.split()[-1]}")


def _expire(arena: Arena, load: Load, draw: random.Random) -> Deed:
    arena.etcd.expire_tokens()
    return Deed("the tokens of all nodes' user")


# ---- the network between nodes, and from nodes to etcd ----


def _link(link: Link) -> Inject:
    def inject(arena: Arena, load: Load, draw: random.Random) -> Deed:
        one, other = draw.sample(NAMES, 2)
        arena.proxies.set(one, other, link)
        return Deed(f"between nodes {one} and {other}", arena.proxies.reset)

    return inject


def _partition(nodes: int, blind: int) -> Inject:
    """So many nodes hear nothing of each other, and the first of them nothing of etcd either."""

    def inject(arena: Arena, load: Load, draw: random.Random) -> Deed:
        names = draw.sample(NAMES, nodes)
        link = draw.choice((Link(cut=True), Link(stalled=True)))
        for one, other in itertools.combinations(names, 2):
            arena.proxies.set(one, other, link)
        for name in names[:blind]:
            arena.proxies.set(name, ETCD, link)
        how = "cut" if link.cut else "dead"
        return Deed(
            f"nodes {', '.join(names)}, of which {', '.join(names[:blind])} without etcd ({how})",
            arena.proxies.reset,
        )

    return inject


# ---- elasticity ----


def _desire(more: int) -> Inject:
    def inject(arena: Arena, load: Load, draw: random.Random) -> Deed:
        name = draw.choice(NAMES)
        key, count = f"{PREFIX}desired/{name}", arena.instances + more
        arena.etcd.ctl("put", key, str(count))

        def reached() -> bool:
            with contextlib.suppress(OSError, KeyError):
                ids = [i for i in arena.nodes[name].instances() if i.startswith(f"{name}-")]
                return len(ids) == count
            return False

        began = time.monotonic()
        done = later(reached, 90.0)
        took = f"{time.monotonic() - began:.1f} s" if done else "never"

        def heal() -> None:
            arena.etcd.ctl("put", key, str(arena.instances))
            later(lambda: not arena.unwell(), 60.0)
            arena.etcd.ctl("del", key)

        return Deed(f"{count} instances on node {name}: {took}", heal)

    return inject


def _drain(whole_node: bool) -> Inject:
    def inject(arena: Arena, load: Load, draw: random.Random) -> Deed:
        name = draw.choice(NAMES)
        target = name if whole_node else f"{name}-0"
        arena.etcd.ctl("put", f"{PREFIX}drain/{target}", "chaos")
        return Deed(target, lambda: void(arena.etcd.ctl("del", f"{PREFIX}drain/{target}")))

    return inject


DEATH = r"instance \S+ died|lost the connection to node|connection to node \S+ ended"
SILENCE = r"not answer|unavailable|unknown|unreachable|silent|Deadline|no member"
AGAIN = r"lease|written again|Joined|joined|registered|leads"

FAULTS = (
    *ENGINE_FAULTS,
    Fault("node SIGKILL", _any_node(_kill_node), DEATH, hold=8.0, within=START),
    Fault("node SIGSTOP", _any_node(_freeze_node), DEATH, hold=10.0),
    Fault("node SIGTERM", _terminate_node, r"finishing what runs", within=START, weight=1),
    Fault("rolling restart", _rolling_restart, r"finishing what runs", within=START, weight=1),
    Fault("API server SIGKILL", _kill_api_servers, r"API server \d+ has ended", hold=8.0),
    Fault("leader SIGKILL", _leader(_kill_node), r"leads", hold=8.0, within=START, weight=1),
    Fault("leader SIGSTOP", _leader(_freeze_node), r"leads", hold=10.0),
    Fault("etcd member killed", _kill_member, SILENCE, hold=8.0),
    Fault("etcd member frozen", _freeze_member, SILENCE, hold=10.0),
    Fault("etcd leader frozen", _freeze_etcd_leader, SILENCE, hold=10.0),
    Fault("etcd quorum lost", _lose_quorum, SILENCE, hold=20.0),
    Fault("etcd restarted", _restart_members, SILENCE, hold=3.0),
    Fault("etcd wiped", _wipe, SILENCE, hold=5.0, within=90.0),
    Fault("lease revoked", _revoke, AGAIN, hold=3.0),
    Fault("etcd compacted", _compact, r"compact", hold=3.0),
    Fault("etcd token expired", _expire, hold=3.0),
    Fault("link cut", _link(Link(cut=True)), DEATH, hold=15.0),
    Fault("link dead", _link(Link(stalled=True)), DEATH, hold=15.0),
    Fault("link slow", _link(Link(delay=0.2, loss=0.02)), "", hold=15.0),
    Fault("partition, one without etcd", _partition(2, 1), DEATH, hold=15.0),
    Fault("partition, none with etcd", _partition(2, 2), DEATH, hold=15.0),
    Fault("each node alone", _partition(3, 2), DEATH, hold=15.0),
    Fault("scale out and in", _desire(+1), r"instances are desired", within=90.0),
    Fault("scale in and out", _desire(-1), r"instances are desired", within=90.0),
    Fault("instance drained", _drain(False), r"\(drains\)", hold=8.0),
    Fault("node drained", _drain(True), r"\(drains\)", hold=8.0),
)
