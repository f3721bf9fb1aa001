"""The values of etcd's keys: JSON that an operator can read, to and from the cluster's facts.

Decoding raises ValueError, with a reason to log, for anything that is not what we would write;
fields that a newer version adds are ignored.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from llumnix.cluster import InstanceId, InstanceInfo, InstanceLoad, InstanceState, NodeId, NodeInfo


def encode_node(node: NodeInfo) -> bytes:
    return orjson.dumps(
        {
            "address": node.address,
            "version": node.version,
            "epoch": node.epoch,
            "max_instances": node.max_instances,
            "initial_instances": node.initial_instances,
            "token_mark": node.token_mark,
        }
    )


def decode_node(node: NodeId, value: bytes) -> NodeInfo:
    data = _object(value)
    return NodeInfo(
        node,
        _text(data, "address"),
        _text(data, "version", ""),
        _count(data, "epoch", 0),
        _count(data, "max_instances", 0),
        _count(data, "initial_instances", 0),
        _text(data, "token_mark", ""),
    )


def encode_instance(instance: InstanceInfo) -> bytes:
    return orjson.dumps(
        {
            "node": instance.node,
            "model": instance.model,
            "role": instance.role,
            "state": instance.state.value,
            "total_blocks": instance.total_blocks,
            "block_size": instance.block_size,
            "failed_starts": instance.failed_starts,
        }
    )


def decode_instance(instance: InstanceId, value: bytes) -> InstanceInfo:
    data = _object(value)
    return InstanceInfo(
        id=instance,
        node=_text(data, "node"),
        model=_text(data, "model"),
        state=InstanceState(_text(data, "state")),
        total_blocks=_count(data, "total_blocks"),
        block_size=_count(data, "block_size"),
        role=_text(data, "role", "any"),
        failed_starts=_count(data, "failed_starts", 0),
    )


_COUNTS = (
    *("running", "waiting", "used_blocks", "waiting_blocks", "head_blocks"),
    *("prefill_tokens", "preempted", "preemptions"),
)


def encode_loads(loads: Sequence[InstanceLoad]) -> bytes:
    """All loads of a node."""
    reports = {}
    for load in loads:
        report: dict[str, Any] = {name: getattr(load, name) for name in _COUNTS}
        report["priorities"] = {str(p): count for p, count in load.priorities.items()}
        report["received"] = dict(load.received)
        reports[load.instance] = report
    return orjson.dumps({"loads": reports})


def decode_loads(value: bytes) -> tuple[InstanceLoad, ...]:
    reports = _object(value).get("loads")
    if not isinstance(reports, dict):
        raise ValueError("it has no object 'loads'")
    return tuple(_decode_load(instance, report) for instance, report in reports.items())


def _decode_load(instance: InstanceId, report: Any) -> InstanceLoad:
    if not isinstance(report, dict):
        raise ValueError(f"the load of {instance} is no object")
    received = report.get("received", {})
    if not isinstance(received, dict):
        raise ValueError("'received' is no object")
    priorities = report.get("priorities", {})
    if not isinstance(priorities, dict):
        raise ValueError("'priorities' is no object")
    return InstanceLoad(
        instance,
        **{name: _count(report, name, 0) for name in _COUNTS},
        priorities=MappingProxyType({int(p): _count(priorities, p) for p in priorities}),
        received=MappingProxyType({node: _count(received, node) for node in received}),
    )


def encode_leader(node: NodeId) -> bytes:
    return orjson.dumps({"node": node})


def decode_leader(value: bytes) -> NodeId:
    return _text(_object(value), "node")


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


def encode_desired(desired: Desired) -> bytes:
    """A bare number, unless an instance is named. Raises ValueError for a negative one."""
    if desired.instances < 0:
        raise ValueError(f"{desired.instances} instances can't be desired")
    if desired.without is None:
        return b"%d" % desired.instances
    return orjson.dumps(desired._asdict())


def decode_desired(value: bytes) -> Desired:
    """What an operator or the leader put: 3, or "3", or {"instances": 3, "without": "a-1"}."""
    if value.lstrip().startswith(b"{"):
        data = _object(value)
        return Desired(_count(data, "instances"), _text(data, "without", "") or None)
    try:
        number = int(value.decode().strip().strip('"'))
    except ValueError:
        raise ValueError("it is no whole number") from None
    if number < 0:
        raise ValueError("it is negative")
    return Desired(number)


def _object(value: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(value)
    except orjson.JSONDecodeError:
        raise ValueError("it is no JSON") from None
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    return data


def _text(data: dict[str, Any], name: str, default: str | None = None) -> str:
    value = data.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is no text")
    return value


def _count(data: dict[str, Any], name: str, default: int | None = None) -> int:
    value = data.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"'{name}' is no count")
    return value
