"""Whatever anybody writes into etcd: the view, what is shown of it and what watches it go on."""

from types import SimpleNamespace
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from llumnix.cluster import NodeInfo
from llumnix.control.alarms import Alarms, Sentinel
from llumnix.control.codec import encode_node
from llumnix.control.etcd.types import KeyValue
from llumnix.control.keys import Keys, Kind
from llumnix.control.view import ViewBuilder
from llumnix.metrics import NodeCollector, Snapshot
from llumnix.migration.record import Handshake
from llumnix.server.status_routes import describe

KEYS = Keys("prod")
ME = NodeInfo("a", "10.0.0.1:1", "1", 7, token_mark="m")
FIELDS = (
    *("node", "address", "version", "epoch", "max_instances", "initial_instances", "token_mark"),
    *("model", "role", "state", "total_blocks", "block_size", "loads", "a-0", "running", "waiting"),
    *(
        "used_blocks",
        "priorities",
        "received",
        "instances",
        "without",
        "1",
        "source",
        "destination",
    ),
    *("request", "migration", "reason", "started"),
)
LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(["a", "a-0", "ready", "starting", "proposed", "9" * 5000, 0, 1, 2**53])
)  # fmt: skip
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=6)
    ),
    max_leaves=12,
)
VALUES = (
    st.binary(max_size=40)
    | JSON.map(orjson.dumps)
    | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=12).map(orjson.dumps)
)
NAMES = st.sampled_from(["a", "a-0", "b", "", "a/b", "%2F", "\ufffd", "x" * 300, "..", "a b"])
PATHS = st.builds(
    lambda kind, name, bare: KEYS.prefix + kind + ("" if bare else "/" + name),
    st.sampled_from([*Kind, "novelty"]), NAMES, st.booleans(),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.lists(st.dictionaries(PATHS, VALUES, max_size=6), min_size=1, max_size=3))
def test_keys_and_values_of_any_kind(snapshots: list[dict[str, bytes]]) -> None:
    builder = ViewBuilder(KEYS)
    sentinel = Sentinel(KEYS, ME, 0, "secret", Alarms())
    session: Any = SimpleNamespace(lease=1)
    handshake = Handshake(session, session, KEYS)
    for revision, written in enumerate(snapshots, 1):
        items = {k: KeyValue(k, v, revision, revision, revision % 2) for k, v in written.items()}
        sentinel.look(items)
        handshake.appeared(items)
        view = builder.build(items, revision)
        assert view.revision == revision
        orjson.dumps(describe("a", view, 0.0))
        registry = CollectorRegistry()
        registry.register(NodeCollector(lambda view=view: Snapshot("a", view, 0.0, (), None)))
        generate_latest(registry)


def test_what_is_nested_too_deeply_hides_nothing_behind_it() -> None:
    """A list of keys is read in their order, and nothing of it is read again."""
    deep = b'{"a":' * 3000 + b"1" + b"}" * 3000
    keys = [KEYS.desired("aaa"), KEYS.instance("a-0"), KEYS.node("a"), KEYS.node("b")]
    values = [deep, deep, deep, encode_node(ME)]
    items = {k: KeyValue(k, v, 1, 1) for k, v in zip(keys, values, strict=True)}
    view = ViewBuilder(KEYS).build(items, 1)
    assert list(view.nodes) == ["b"] and not view.instances and not view.desired
