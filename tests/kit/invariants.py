"""What must be so whenever no migration is under way, whatever has happened before."""

import asyncio

from llumnix.control.keys import Kind
from llumnix.dataplane.ledger import Acceptance
from llumnix.migration.actor import MigrationActor
from tests.kit.loop import soon
from tests.kit.migrating import Cluster


async def check_invariants(cluster: Cluster) -> None:
    """One owner for each request, each position once, every block accounted for, no record left.

    Waits until nothing moves any more.
    """
    try:
        await soon(lambda: not _troubles(cluster), within=20.0)
    except AssertionError as error:
        raise AssertionError(f"{error}: {'; '.join(_troubles(cluster))}") from None
    for site in cluster.sites.values():
        moves = await site.actor.ask(MigrationActor.under_way)
        assert not moves, "a migration is still in the books"
        dropped = site.node.client.ledger.dropped
        assert not dropped[Acceptance.REPEATED] and not dropped[Acceptance.GAP], dropped
        for name, stream in site.node.streams.items():
            right = cluster.answers[name]
            assert stream.tokens == right[: len(stream.tokens)], f"{name} has wrong tokens"
    records = await asyncio.to_thread(_records, cluster)
    assert not records, f"left in etcd: {records}"


def _records(cluster: Cluster) -> list[str]:
    etcd = next(iter(cluster.controls.values())).etcd
    found, _ = etcd.get_prefix(f"{cluster.keys.prefix}{Kind.MIGRATION}/")
    return [kv.key for kv in found]


def _troubles(cluster: Cluster) -> list[str]:
    """What is not as it must be, a sentence each."""
    found = []
    for name, site in cluster.sites.items():
        if site.migrations._departures._under_way:
            found.append(f"node {name} is still at a migration")
        if len(site.migrations._arrivals) or site.migrations._arrivals._tasks:
            found.append(f"node {name} still waits for a request to come")
        if site.node.client._tasks:
            found.append(f"the API server {name} is still placing a request")
        found += _owners(cluster, name)
    for instance in cluster.order:
        if cluster.alive(instance):
            found += _books(cluster, instance)
    return found


def _owners(cluster: Cluster, node: str) -> list[str]:
    """Each open request runs at the one instance that its ledger names, in that epoch."""
    found = []
    ledger = cluster.sites[node].node.client.ledger
    for request in list(ledger._entries):
        entry = ledger.get(request)
        here = cluster.where(request)
        if entry is None or here != [entry.owner]:
            found.append(f"request {request} is at {here}, its owner is {entry and entry.owner}")
            continue
        held = cluster.hosted(here[0]).find(request)
        assert held is not None
        if held.epoch != entry.epoch:
            found.append(f"request {request} runs in epoch {held.epoch} of {entry.epoch}")
        if held.moving:
            found.append(f"request {request} is leaving")
    return found


def _books(cluster: Cluster, instance: str) -> list[str]:
    """The engine runs what its node knows of and an API server owns, and holds nothing else."""
    hosted, engine = cluster.hosted(instance), cluster.engine(instance)
    engine.model.check()
    found = []
    if engine.blocks.held or engine.model.held_blocks:
        found.append(f"{instance} holds {engine.model.held_blocks} blocks for a migration")
    if hosted._expected:
        found.append(f"{instance} expects {list(hosted._expected.values())}")
    # The last step of a request is computed before its output leaves the engine.
    running = set(engine.model._known)
    if not running <= {held.name for held in hosted.requests}:
        found.append(f"{instance} runs {running}, but is asked for {hosted._by_name.keys()}")
    if not running and engine.model.free_blocks != engine.model.config.total_blocks:
        found.append(f"{instance} is idle with {engine.model.free_blocks} free blocks")
    for held in hosted.requests:
        if not any(held.request_id in s.node.client.ledger for s in cluster.sites.values()):
            found.append(f"{instance} runs {held.request_id}, which nobody wants")
    return found
