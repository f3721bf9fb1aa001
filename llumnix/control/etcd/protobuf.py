"""pyetcd's messages, to and from our own types."""

from collections.abc import Sequence
from typing import Any

from pyetcd import etcdrpc as pb

from llumnix.control.etcd.types import (
    Compare,
    Delete,
    KeyValue,
    Op,
    Probe,
    Put,
    TxnResult,
    WatchBatch,
)

_DELETED = 1  # the type of an event; 0 is a put

_FIELDS = {
    "create": (pb.Compare.CREATE, "create_revision"),
    "mod": (pb.Compare.MOD, "mod_revision"),
    "lease": (pb.Compare.LEASE, "lease"),
    "value": (pb.Compare.VALUE, "value"),
}


def read(key: str) -> Any:
    return pb.RangeRequest(key=key.encode())


def read_prefix(prefix: str) -> Any:
    return pb.RangeRequest(key=prefix.encode(), range_end=_end_of(prefix))


def read_newest(prefix: str) -> Any:
    """Ask for no more than a Probe needs."""
    return pb.RangeRequest(
        key=prefix.encode(),
        range_end=_end_of(prefix),
        keys_only=True,
        limit=1,
        sort_order=pb.RangeRequest.DESCEND,
        sort_target=pb.RangeRequest.MOD,
    )


def write(put: Put) -> Any:
    return pb.PutRequest(key=put.key.encode(), value=put.value, lease=put.lease)


def delete(key: str) -> Any:
    return pb.DeleteRangeRequest(key=key.encode())


def transaction(when: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op]) -> Any:
    return pb.TxnRequest(
        compare=[_compare(compare) for compare in when],
        success=[_operation(op) for op in then],
        failure=[_operation(op) for op in otherwise],
    )


def grant(ttl: int) -> Any:
    return pb.LeaseGrantRequest(TTL=ttl)


def keep_alive(lease: int) -> Any:
    return pb.LeaseKeepAliveRequest(ID=lease)


def revoke(lease: int) -> Any:
    return pb.LeaseRevokeRequest(ID=lease)


def authenticate(user: str, password: str) -> Any:
    return pb.AuthenticateRequest(name=user, password=password)


def watch_prefix(prefix: str, revision: int) -> Any:
    create = pb.WatchCreateRequest(
        key=prefix.encode(), range_end=_end_of(prefix), start_revision=revision
    )
    return pb.WatchRequest(create_request=create)


def key_value(kv: Any) -> KeyValue:
    key = kv.key.decode(errors="replace")
    return KeyValue(key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def batch(response: Any) -> WatchBatch:
    """A watch's answer, which has at least one event."""
    events = [(key_value(event.kv), event.type == _DELETED) for event in response.events]
    changes = [(kv.key, None if deleted else kv) for kv, deleted in events]
    return WatchBatch(changes, events[-1][0].mod_revision)


def probe(response: Any) -> Probe:
    """The answer to `read_newest`."""
    return Probe(response.count, response.kvs[0].mod_revision if response.kvs else 0)


def txn_result(response: Any) -> TxnResult:
    ranges = [entry.response_range.kvs for entry in response.responses]
    found = [key_value(kvs[0]) if kvs else None for kvs in ranges]
    return TxnResult(response.succeeded, response.header.revision, found)


def _end_of(prefix: str) -> bytes:
    """The first key after all that begin with `prefix`, which ends in a plain ASCII character."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])


def _compare(compare: Compare) -> Any:
    target, name = _FIELDS[compare.field]
    condition = {name: compare.value}
    return pb.Compare(key=compare.key.encode(), target=target, result=pb.Compare.EQUAL, **condition)


def _operation(op: Op) -> Any:
    if isinstance(op, Put):
        return pb.RequestOp(request_put=write(op))
    if isinstance(op, Delete):
        return pb.RequestOp(request_delete_range=delete(op.key))
    return pb.RequestOp(request_range=read(op.key))
