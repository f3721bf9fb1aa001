"""llumnix's own metrics, read from the node's state when Prometheus asks.

Nothing is counted on the path of a token: a scrape reads what the objects keep anyway.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llumnix.cluster import ClusterView, InstanceLoad, NodeId

DISPATCH_SECONDS = Histogram(
    "llumnix_dispatch_seconds",
    "Time from a request's arrival at the dispatcher to its decision",
    buckets=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 1.0),
)
REFUSALS = Counter("llumnix_refusals", "Requests refused by a limit", ["limit"])
CONNECTIONS = Gauge(
    "llumnix_connections", "Open connections to this node's address", multiprocess_mode="livesum"
)
CLOSED = Counter("llumnix_connections_closed", "Connections that the node has ended", ["reason"])
KEY_FAULTS = Counter(
    "llumnix_key_faults", "Times that a key was found as no node has written it", ["about"]
)
MIGRATIONS = Counter(
    "llumnix_migrations", "Migrations by this node's instances", ["reason", "outcome", "stages"]
)
MIGRATION_BLOCKS = Counter(
    "llumnix_migration_blocks", "KV blocks of migrations, sent or there already", ["what"]
)
MIGRATION_BYTES = Counter(
    "llumnix_migration_bytes", "KV cache of migrations, sent or there already", ["what"]
)
MIGRATION_CONFLICTS = Counter(
    "llumnix_epoch_conflicts", "Commands refused because their leader leads no more"
)
MIGRATION_SECONDS = Histogram(
    "llumnix_migration_seconds",
    "From the proposal of a migration to its end",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
MIGRATION_GAP_SECONDS = Histogram(
    "llumnix_migration_gap_seconds",
    "Between the last token of the old instance and the first of the new one",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
FAILOVER_SECONDS = Histogram(
    "llumnix_failover_seconds",
    "From when an instance or its node was known to be lost to a request's next token elsewhere",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)

# Names and texts of what each API server counts.
OPEN_REQUESTS = "llumnix_open_requests", "Requests of this node's clients"
DISPATCHES = "llumnix_dispatches", "Requests dispatched"
DROPPED_OUTPUTS = "llumnix_dropped_outputs", "Outputs refused by the ledger"


@dataclass(frozen=True)
class Counts:
    """What an API server has open and has done."""

    open_requests: int = 0
    dispatched: Mapping[str, int] = field(default_factory=dict)  # by instance
    dropped: Mapping[str, int] = field(default_factory=dict)  # outputs refused, by reason


@dataclass(frozen=True)
class Snapshot:
    """What one scrape shows."""

    node: NodeId
    view: ClusterView
    view_age: float  # seconds
    loads: tuple[InstanceLoad, ...]  # of this node's instances
    counts: Counts | None  # None: each API server has its own, in a process of its own
    peers: int = 0
    classes: Mapping[int, str] = field(default_factory=dict)  # names of priority classes
    mean_freeness: float = 0.0  # KV blocks a request


class NodeCollector(Collector):
    """Turns a snapshot into metrics."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """No metric is known before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client for each scrape."""
        now = self._snapshot()
        yield from _of_cluster(now)
        yield from _of_instances(now.loads)
        if now.classes:
            yield _of_classes(now.loads, now.classes)
        if now.counts is not None:
            yield GaugeMetricFamily(*OPEN_REQUESTS, now.counts.open_requests)
            yield _counter(*DISPATCHES, "instance", now.counts.dispatched)
            yield _counter(*DROPPED_OUTPUTS, "reason", now.counts.dropped)


def _of_cluster(now: Snapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily("llumnix_nodes", "Nodes in the cluster", len(now.view.nodes))
    states = collections.Counter(str(i.state) for i in now.view.instances.values())
    yield _gauge("llumnix_instances", "Instances in the cluster", "state", states)
    text = "Instances that are to run on a node, where a number is desired in etcd"
    yield _gauge("llumnix_desired_instances", text, "node", now.view.desired)
    text = "KV blocks free for each request of the cluster, which --autoscale goes by"
    yield GaugeMetricFamily("llumnix_mean_freeness", text, now.mean_freeness)
    leads = float(now.view.leader == now.node)
    yield GaugeMetricFamily("llumnix_leader", "1 on the node that leads the cluster", leads)
    yield GaugeMetricFamily(
        "llumnix_view_age_seconds", "Since the view was last proven current", now.view_age
    )
    yield GaugeMetricFamily("llumnix_peers", "Open links to other nodes", now.peers)


def _of_instances(loads: tuple[InstanceLoad, ...]) -> Iterator[Metric]:
    fields = {
        "running": "Requests in the batch",
        "waiting": "Requests queued",
        "used_blocks": "KV blocks held by running requests",
        "waiting_blocks": "KV blocks asked for by queued requests",
    }
    for name, text in fields.items():
        values = {load.instance: getattr(load, name) for load in loads}
        yield _gauge(f"llumnix_instance_{name}", text, "instance", values)
    preempted = {load.instance: load.preemptions for load in loads}
    yield _counter("llumnix_preemptions", "Requests preempted", "instance", preempted)


def _of_classes(loads: Iterable[InstanceLoad], names: Mapping[int, str]) -> Metric:
    """Priorities without a class count together: clients may think of any number of them."""
    text = "Requests running and queued, by priority class"
    gauge = GaugeMetricFamily("llumnix_instance_requests", text, labels=["instance", "class"])
    for load in loads:
        counts = dict.fromkeys((*names.values(), "other"), 0)
        normal = load.running + load.waiting - sum(load.priorities.values())
        for priority, count in {**load.priorities, 0: normal}.items():
            counts[names.get(priority, "other")] += count
        for name, count in counts.items():
            gauge.add_metric([load.instance, name], count)
    return gauge


def _gauge(name: str, text: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
