"""The values of etcd's keys: JSON that an operator can read, to and from the cluster's facts.

The fields of a fact are the keys of its JSON, but for its name, which the key in etcd has. Decoding
raises ValueError, with a reason to log, for anything that is not what we would write; fields that a
newer version adds are ignored.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import msgspec
import orjson

from llumnix.cluster import Count, InstanceId, InstanceInfo, InstanceLoad, NodeId, NodeInfo

_T = TypeVar("_T")


def encode_node(node: NodeInfo) -> bytes:
    return _dumps(_without_name(node))


def decode_node(node: NodeId, value: bytes) -> NodeInfo:
    data = {"version": "", "epoch": 0} | _object(value) | {"id": node}
    return msgspec.convert(data, NodeInfo)


def encode_instance(instance: InstanceInfo) -> bytes:
    return _dumps(_without_name(instance))


def decode_instance(instance: InstanceId, value: bytes) -> InstanceInfo:
    data = _object(value) | {"id": instance}
    return msgspec.convert(data, InstanceInfo)


class _Loads(msgspec.Struct):
    loads: dict[InstanceId, dict[str, Any]]


def encode_loads(loads: Sequence[InstanceLoad]) -> bytes:
    """The value of a node's key `load`: the loads of all its instances."""
    return _dumps({"loads": {load.instance: _without_name(load) for load in loads}})


def decode_loads(value: bytes) -> tuple[InstanceLoad, ...]:
    reports = _decoded(value, _Loads).loads
    return tuple(_decode_load(instance, report) for instance, report in reports.items())


def _decode_load(instance: InstanceId, report: dict[str, Any]) -> InstanceLoad:
    load: InstanceLoad = msgspec.convert(
        report | {"instance": instance}, InstanceLoad, str_keys=True
    )
    return replace(
        load,
        priorities=MappingProxyType(load.priorities),
        received=MappingProxyType(load.received),
    )


class _Leader(msgspec.Struct):
    node: NodeId


def encode_leader(node: NodeId) -> bytes:
    return orjson.dumps({"node": node})


def decode_leader(value: bytes) -> NodeId:
    return _decoded(value, _Leader).node


def encode_text(text: str) -> bytes:
    return orjson.dumps(text)


def decode_text(value: bytes) -> str:
    """A JSON string, or the bare text that an operator may have put."""
    try:
        text = orjson.loads(value)
    except orjson.JSONDecodeError:
        text = value.decode()
    if not isinstance(text, str) or not text.strip():
        raise ValueError("it is no text")
    return text.strip()


class Desired(NamedTuple):
    """What is wanted of a node: so many instances, and if one is to go, this one first."""

    instances: int
    without: InstanceId | None = None


class _Desired(msgspec.Struct):
    instances: Count
    without: InstanceId = ""


def encode_desired(desired: Desired) -> bytes:
    """A bare number, unless an instance is named. Raises ValueError for a negative one."""
    if desired.instances < 0:
        raise ValueError(f"{desired.instances} instances can't be desired")
    if desired.without is None:
        return b"%d" % desired.instances
    return orjson.dumps(desired._asdict())


def decode_desired(value: bytes) -> Desired:
    """What an operator or the leader wants: 3, or "3", or {"instances": 3, "without": "a-1"}."""
    if value.lstrip().startswith(b"{"):
        found = _decoded(value, _Desired)
        return Desired(found.instances, found.without or None)
    try:
        number = int(value.decode().strip().strip('"'))
    except ValueError:
        raise ValueError("it is no whole number") from None
    if not 0 <= number < 2**63:
        raise ValueError("it is negative, or no number of instances")
    return Desired(number)


def _without_name(fact: NodeInfo | InstanceInfo | InstanceLoad) -> dict[str, Any]:
    """All fields of a fact but the first, its name."""
    return {field.name: getattr(fact, field.name) for field in fields(fact)[1:]}


def _dumps(value: dict[str, Any]) -> bytes:
    """As JSON, with numbers as keys and read-only mappings."""
    return orjson.dumps(value, default=dict, option=orjson.OPT_NON_STR_KEYS)


def _object(value: bytes) -> dict[str, Any]:
    return _decoded(value, dict[str, Any])


def _decoded(value: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(value, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
