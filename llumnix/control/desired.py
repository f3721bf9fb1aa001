"""How the leader has instances added and removed: the numbers under desired/, written with care."""

from collections.abc import Mapping
from dataclasses import dataclass

from llumnix.cluster import InstanceId, NodeId
from llumnix.control.codec import Desired, decode_desired, encode_desired
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdRefused
from llumnix.control.etcd.types import Compare, Get, KeyValue, Put
from llumnix.control.keys import Keys


@dataclass(frozen=True, slots=True)
class Wish:
    """The numbers of instances that a leader wants on some nodes from now on."""

    epoch: int  # of the leader; once another leads, the wish is nobody's
    numbers: Mapping[NodeId, int]
    seen: Mapping[NodeId, int]  # what was desired when it decided, of nodes that had a number
    without: InstanceId | None = None  # which instance goes, where one does


def put_desired(etcd: Etcd, keys: Keys, wish: Wish) -> None:
    """Write the numbers, all or none of them. Blocks.

    A number that was changed since the leader saw it stays: an operator's word counts more.

    Raises:
        EtcdRefused: another leads, or a number is not what the leader saw; nothing is written.
        EtcdError: etcd does not answer.
    """
    conditions, writes = [Compare(keys.leader, "create", wish.epoch)], []
    for node, number in wish.numbers.items():
        found = etcd.get(keys.desired(node))
        if (now := _number(found)) != (seen := wish.seen.get(node)):
            raise EtcdRefused(
                f"{_shown(now)} on {node}, and no longer {_shown(seen)}: somebody has changed it"
            )
        mod_revision = found.mod_revision if found is not None else 0
        conditions.append(Compare(keys.desired(node), "mod", mod_revision))
        value = encode_desired(Desired(number, wish.without))
        writes.append(Put(keys.desired(node), value))
    done = etcd.txn(conditions, writes, [Get(keys.leader)])
    if done.succeeded:
        return
    (leader,) = done.found
    if leader is None or leader.create_revision != wish.epoch:
        raise EtcdRefused(f"this node does not lead any more, as it did in epoch {wish.epoch}")
    raise EtcdRefused(f"what is desired on {', '.join(wish.numbers)} was changed meanwhile")


def _number(found: KeyValue | None) -> int | None:
    """The number in a key; None also for what no node understands."""
    if found is None:
        return None
    try:
        return decode_desired(found.value).instances
    except ValueError:
        return None


def _shown(number: int | None) -> str:
    return "no number is desired" if number is None else f"{number} are desired"
