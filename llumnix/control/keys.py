"""Where everything lies in etcd, under /llumnix/<cluster>/."""

from enum import StrEnum
from typing import NamedTuple
from urllib.parse import quote, unquote

from llumnix.cluster import InstanceId, NodeId


class Kind(StrEnum):
    """What a key is about: the first part of its name below the cluster's prefix."""

    NODE = "nodes"
    INSTANCE = "instances"
    LOAD = "load"
    LEADER = "leader"
    DESIRED = "desired"
    DRAIN = "drain"
    TOKEN = "token"
    ADMIN_TOKEN = "admin-token"
    MIGRATION = "migrations"
    C10D = "c10d"


class Parsed(NamedTuple):
    """A key taken apart; `name` is empty for the keys of which there is one in a cluster."""

    kind: Kind
    name: str


class Keys:
    """The names of one cluster's keys. Raises ValueError for a name that would not be one part."""

    def __init__(self, cluster: str) -> None:
        self.prefix = f"/llumnix/{_part(cluster)}/"
        self.leader = self.prefix + Kind.LEADER
        self.token = self.prefix + Kind.TOKEN
        self.admin_token = self.prefix + Kind.ADMIN_TOKEN

    def node(self, node: NodeId) -> str:
        """The node's address; kept by its lease."""
        return self._under(Kind.NODE, node)

    def instance(self, instance: InstanceId) -> str:
        """What the instance is; kept by its node's lease."""
        return self._under(Kind.INSTANCE, instance)

    def load(self, node: NodeId) -> str:
        """The loads of all the node's instances; kept by its lease."""
        return self._under(Kind.LOAD, node)

    def desired(self, node: NodeId) -> str:
        """How many instances an operator wants on the node."""
        return self._under(Kind.DESIRED, node)

    def drain(self, name: str) -> str:
        """Present while that node or instance drains."""
        return self._under(Kind.DRAIN, name)

    def migration(self, request: str) -> str:
        """The record of the request's migration; a request id may have any characters."""
        return self._under(Kind.MIGRATION, quote(request, safe=""))

    def c10d(self, pair: str) -> str:
        """The prefix of one transfer group's rendezvous."""
        return self._under(Kind.C10D, pair) + "/"

    def parse(self, key: str) -> Parsed | None:
        """What the key is about; None when it is none of this cluster's."""
        if not key.startswith(self.prefix):
            return None
        kind, _, name = key[len(self.prefix) :].partition("/")
        if kind == Kind.MIGRATION:
            name = unquote(name)
        try:
            return Parsed(Kind(kind), name)
        except ValueError:
            return None

    def _under(self, kind: Kind, name: str) -> str:
        return f"{self.prefix}{kind}/{_part(name)}"


def _part(name: str) -> str:
    if not name or "/" in name or not name.isprintable() or " " in name:
        raise ValueError(f"{name!r} can't be part of an etcd key: it must have no / and no space")
    return name
