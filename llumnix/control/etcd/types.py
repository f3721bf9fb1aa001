"""What is read from etcd, and what a transaction is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as etcd holds it; `lease` is 0 for a key that no lease keeps."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Compare:
    """A transaction's condition: `field` of `key` equals `value`.

    A key that doesn't exist has 0 for its create and mod revision and its lease.
    """

    key: str
    field: Literal["create", "mod", "lease", "value"]
    value: int | bytes


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Get:
    key: str


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


Op = Put | Get | Delete


@dataclass(frozen=True, slots=True)
class TxnResult:
    """What a transaction did.

    `succeeded` says whether every condition held; `found` has one entry for each operation of
    the branch that ran: what a Get found, None for anything else.
    """

    succeeded: bool
    revision: int
    found: Sequence[KeyValue | None]


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Changes that a watch delivered, in order; `None` as the value of a key that was deleted."""

    changes: Sequence[tuple[str, KeyValue | None]]
    revision: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What a prefix looks like from one member: enough to tell whether a watch is behind."""

    count: int  # keys under the prefix
    newest: int  # the highest mod revision among them; 0 when there are none
