"""A node's side of the control plane, opened in order and closed in reverse."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tenacity import (
    before_sleep_log,
    retry,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from llumnix import __version__
from llumnix.addresses import parts
from llumnix.cluster import ClusterView, NodeId, NodeInfo
from llumnix.config import Config
from llumnix.control.alarms import Alarms, Sentinel
from llumnix.control.cluster_secrets import (
    agreed_token,
    ensure_token,
    made_token,
    prevails,
    same_token,
    token_mark,
    weakness,
)
from llumnix.control.codec import encode_node, encode_text
from llumnix.control.election import Election
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdUnavailable
from llumnix.control.etcd.server import EmbeddedEtcd
from llumnix.control.etcd.session import Session, fitting_timeout, interval_of
from llumnix.control.etcd.types import KeyValue
from llumnix.control.keys import Keys, Kind
from llumnix.control.name_claim import MORE, Claim
from llumnix.control.registry import Registry
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from llumnix.migration.record import Handshake, MigrationRecord

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

FIRST_ANSWER = 15.0  # seconds that etcd has for its first answers, at a start of everything


@retry(
    retry=retry_if_exception_type(EtcdUnavailable),
    stop=stop_after_delay(FIRST_ANSWER),
    wait=wait_random_exponential(multiplier=0.2, max=2.0),
    before_sleep=before_sleep_log(logger, logging.WARNING),
    reraise=True,
)
def _patiently(ask: Callable[..., Answer], *args: Any) -> Answer:
    """Ask etcd something until it answers. Raises EtcdUnavailable after FIRST_ANSWER seconds."""
    return ask(*args)


class ControlPlane:
    """The etcd client, the lease, the registry and the election of one node. All calls block."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._keys = Keys(config.cluster)
        self._credentials = {
            name: getattr(config, f"etcd_{name}") or None
            for name in ("user", "password", "ca", "cert", "key")
        }
        self._timeout = fitting_timeout(config.lease_ttl, config.etcd_timeout)
        self._limit = config.lease_ttl + self._timeout  # an outage may use up the ttl, not this
        self._endpoints: list[str] = []
        self._etcd: Etcd
        self.token = config.cluster_token
        self.api_servers = 1
        self.peer_address = ""  # where other nodes dial this one, if not where clients do
        self.session: Session
        self.registry: Registry
        self.election: Election
        self.handshake: Handshake
        self.alarms = Alarms()
        self._sentinel: Sentinel | None = None  # once this node has joined
        self._ends = contextlib.ExitStack()

    def open(
        self,
        on_view: Callable[[ClusterView], None],
        on_record: Callable[[MigrationRecord], None],
    ) -> None:
        """Join the cluster. Raises EtcdError with one sentence if that is not possible.

        On the registry's thread, `on_view` is told of each new view, and `on_record` of each record
        of a migration that this node has, or had, proposed.
        """
        config = self._config
        self._connect()
        self._prepare_token()
        self._make_parts(partial(self._look_at_keys, on_record))
        self.registry.subscribe(on_view)
        self.registry.subscribe(self.election.observe)
        self.session.start()
        self.registry.start()
        self.registry.wait_view(FIRST_ANSWER)
        self._me = NodeInfo(
            id=config.node,
            address=config.advertise_address,
            version=__version__,
            epoch=time.time_ns() // 1000,
            max_instances=config.max_instances,
            initial_instances=config.initial_instances,
            token_mark=self._agree(),
            api_servers=self.api_servers,
            peer_address=self.peer_address,
        )
        key, alone = self._keys.node(config.node), not config.etcd_endpoints
        self._claim = Claim(self._etcd, key, self._me, alone=alone)
        self._claim.wait(config.lease_ttl)

    def _connect(self) -> None:
        """Make the client, of an etcd of this node's own if there is no other."""
        config = self._config
        self._endpoints = list(config.etcd_endpoints or ())
        if not self._endpoints:
            embedded = EmbeddedEtcd(Path(config.state_dir) / "etcd" / config.cluster)
            embedded.start()
            self._ends.callback(embedded.stop)
            self._endpoints = list(embedded.endpoints)
        self._etcd = Etcd(self._endpoints, **self._credentials, call_timeout=self._timeout)
        self._ends.callback(self._etcd.close)

    def _prepare_token(self) -> None:
        """Warn of a weak token; where none was given, see that etcd has one."""
        if not self.token:
            _patiently(ensure_token, self._etcd, self._keys.token)
        elif (weak := weakness(self.token)) is not None:
            logger.warning("%s", weak)

    def _make_parts(self, on_keys: Callable[[Mapping[str, KeyValue]], None]) -> None:
        """Make all that stands on the client."""
        etcd, keys, ttl = self._etcd, self._keys, self._config.lease_ttl
        self.session = Session(etcd, ttl)
        self.registry = Registry(etcd, self.session, keys, grace=ttl, on_keys=on_keys)
        self.election = Election(
            *(etcd, self.session, keys, self._config.node),
            interval=interval_of(ttl),
            patience=ttl,
            alarms=self.alarms,
        )
        self.handshake = Handshake(etcd, self.session, keys)
        for part in (self.session, self.registry, self.election):
            self._ends.callback(part.stop)

    def _agree(self) -> str:
        """Have the token that the others have, and keep it in etcd; the mark that shows it."""
        if self._config.cluster_token:
            return ""
        within = self._config.lease_ttl + MORE
        self.token = agreed_token(self._etcd, self._keys.token, self._marks, within)
        mark = token_mark(self.token)

        def is_wrong(found: bytes) -> bool:
            return not same_token(found, self.token) and prevails(mark, [mark, *self._marks()])

        self.session.keep(self._keys.token, encode_text(self.token), is_wrong)
        return mark

    def _marks(self) -> list[str]:
        """Of the tokens that the other nodes have."""
        nodes = self.view().nodes.values()
        return [node.token_mark for node in nodes if node.id != self._config.node]

    def admin_token(self) -> str:
        """The cluster's own token for operators, made if there is none. Raises EtcdError."""
        token = _patiently(made_token, self._etcd, self._keys.admin_token)
        self.session.keep(self._keys.admin_token, encode_text(token))
        return token

    def _look_at_keys(
        self, on_record: Callable[[MigrationRecord], None], items: Mapping[str, KeyValue]
    ) -> None:
        if self._sentinel is not None:
            self._sentinel.look(items)
        for record in self.handshake.appeared(items):
            on_record(record)

    def rendezvous(self) -> Rendezvous:
        """Where workers of two instances meet: a store over etcd."""
        prefix = f"{self._keys.prefix}{Kind.C10D}/"
        arguments = {"endpoints": self._endpoints, **self._credentials, "prefix": prefix}
        host, _ = parts(self._config.advertise_address)
        return Rendezvous("llumnix.control.c10d_store.EtcdStore", arguments, host)

    def join(self) -> None:
        """Make this node known to the others and stand for leader. Raises NameTaken."""
        revision = self._claim.take(self.session, encode_node(self._me))
        # What an earlier process of this node left, if it was killed, lives until its lease ends.
        for instance in self.registry.view.instances_of(self._me.id):
            self._etcd.delete(self._keys.instance(instance.id))
        self.registry.announce_node(self._me)
        token = None if self._config.cluster_token else self.token
        self._sentinel = Sentinel(self._keys, self._me, revision, token, self.alarms)
        self.election.start()

    def view(self) -> ClusterView:
        """The cluster as this node sees it now."""
        return self.registry.view

    def address_of(self, node: NodeId) -> str | None:
        """Where a node is dialled; None if it is not in the cluster."""
        info = self.view().nodes.get(node)
        return (info.peer_address or info.address) if info else None

    def standstill(self) -> str:
        """One sentence that names what of the control loop hangs or has died; empty if nothing."""
        pulses = self.session.pulse, self.registry.pulse, self.election.pulse
        slowest = max(pulses, key=lambda pulse: pulse.age)
        if slowest.age <= self._limit:
            return ""
        since = f"{slowest.name} came round last {slowest.age:.0f} s ago"
        return f"the control loop stands still: {since}"

    def retire(self) -> None:
        """Hand over if this node leads, and never lead again; returns at once."""
        self.election.retire()

    def close(self) -> None:
        """Leave the cluster: keys vanish at once; the embedded etcd ends last."""
        self._ends.close()
