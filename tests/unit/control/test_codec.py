"""Names and values of the keys: what we write we read, and nothing else harms us."""

import contextlib
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.cluster import InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.control import codec
from llumnix.control.keys import Keys, Kind, Parsed

KEYS = Keys("prod")
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
counts = st.integers(0, 2**53)
nodes = st.builds(NodeInfo, names, names, names, counts, counts)
instances = st.builds(
    InstanceInfo, names, names, names, st.sampled_from(InstanceState), *[counts] * 2, names, counts
)
loads = st.builds(
    InstanceLoad,
    names,
    *[counts] * 6,
    received=st.dictionaries(names, counts, max_size=3),
)


def test_layout() -> None:
    assert [
        KEYS.node("n"),
        KEYS.instance("i"),
        KEYS.load("n"),
        KEYS.leader,
        KEYS.desired("n"),
        KEYS.drain("i"),
        KEYS.token,
        KEYS.migration("m"),
        KEYS.c10d("p"),
    ] == [
        "/llumnix/prod/nodes/n",
        "/llumnix/prod/instances/i",
        "/llumnix/prod/load/n",
        "/llumnix/prod/leader",
        "/llumnix/prod/desired/n",
        "/llumnix/prod/drain/i",
        "/llumnix/prod/token",
        "/llumnix/prod/migrations/m",
        "/llumnix/prod/c10d/p/",
    ]


def test_parse_is_the_inverse() -> None:
    assert KEYS.parse(KEYS.desired("n:1")) == Parsed(Kind.DESIRED, "n:1")
    assert KEYS.parse(KEYS.leader) == Parsed(Kind.LEADER, "")
    assert KEYS.parse("/llumnix/prod/novelty/x") is None
    assert KEYS.parse("/llumnix/production/leader") is None


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a\n"])
def test_names_that_are_no_part_of_a_key(name: str) -> None:
    with pytest.raises(ValueError):
        KEYS.node(name)
    with pytest.raises(ValueError):
        Keys(name)


@given(nodes, instances, st.lists(loads, max_size=3, unique_by=lambda load: load.instance))
def test_what_is_written_is_read(
    node: NodeInfo, instance: InstanceInfo, reports: list[InstanceLoad]
) -> None:
    assert codec.decode_node(node.id, codec.encode_node(node)) == node
    assert codec.decode_instance(instance.id, codec.encode_instance(instance)) == instance
    assert list(codec.decode_loads(codec.encode_loads(reports))) == reports


json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["loads", "node", "received", "i"]), inner, max_size=3)
    ),
)
values = st.binary(max_size=20) | json.map(orjson.dumps)


@pytest.mark.parametrize(
    "decode",
    [
        lambda value: codec.decode_node("n", value),
        lambda value: codec.decode_instance("i", value),
        codec.decode_loads,
        codec.decode_leader,
        codec.decode_desired,
        codec.decode_text,
    ],
)
@given(value=values)
def test_anything_else_raises_nothing_but_value_error(
    decode: Callable[[bytes], Any], value: bytes
) -> None:
    with contextlib.suppress(ValueError):
        decode(value)
    for deep in (b"[" * 3000 + b"]" * 3000, b'{"a":' * 3000 + b"1" + b"}" * 3000):
        with contextlib.suppress(ValueError):
            decode(deep)


@pytest.mark.parametrize(
    ("value", "desired"),
    [
        (b"3", (3, None)),
        (b'"4"', (4, None)),
        (b" 0\n", (0, None)),
        (b'{"instances": 2}', (2, None)),
        (b' {"instances": 2, "without": "a-1", "why": "it is hot"}', (2, "a-1")),
    ],
)
def test_desired(value: bytes, desired: tuple[int, str | None]) -> None:
    assert codec.decode_desired(value) == desired


@pytest.mark.parametrize("field", ["epoch", "max_instances"])
def test_a_number_that_nobody_can_be_told_of_is_none(field: str) -> None:
    """Its node would go on to tell its API servers of nothing any more."""
    value = b'{"address": "a:1", "%s": 99999999999999999999}' % field.encode()
    with pytest.raises(ValueError):
        codec.decode_node("n", value)


@given(st.builds(codec.Desired, counts, st.none() | names))
def test_desired_is_read_as_written(desired: codec.Desired) -> None:
    assert codec.decode_desired(codec.encode_desired(desired)) == desired


@pytest.mark.parametrize(
    "value",
    [b"", b"x", b"-1", b"1.5", b"[]", b"{}", b"{", b"\xff", b"9" * 20, b'{"instances": 1e30}'],
)
def test_desired_ignored(value: bytes) -> None:
    with pytest.raises(ValueError):
        codec.decode_desired(value)


def test_a_field_of_a_newer_version_is_ignored() -> None:
    assert codec.decode_leader(b'{"node":"a","since":5}') == "a"
