"""The one home of every option of llumnix: name, default, meaning, and what values make sense.

vLLM's own arguments are not here; they are added beside these by the engine's parser.
"""

import argparse
import dataclasses
import math
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llumnix.addresses import address, is_address, own_address
from llumnix.option_fields import (
    Address,
    Count,
    LeaseSeconds,
    Name,
    Seconds,
    Several,
    SomeSeconds,
    check_bounds,
    option,
    option_name,
)
from llumnix.option_fields import ConfigError as ConfigError
from llumnix.secrecy import SecretError, default_state_dir, read_secret, secret, sounds_secret
from llumnix.server_options import ServerOptions


@dataclass(frozen=True, kw_only=True)
class Config(ServerOptions):
    """llumnix's own configuration of one node."""

    cluster: Name = option(
        "default", "name of the cluster; etcd keys live below /llumnix/<cluster>/"
    )
    node: Name = option("", "id of this node, unique in the cluster (default: <host name>-<port>)")
    advertise_address: Address = option(
        "", "host:port at which the other nodes reach this one (default: from --host and --port)"
    )
    etcd_endpoints: Sequence[str] | None = option(
        None,
        "etcd members as host:port, or unix:///path for the one that another node of this machine "
        "has started; without any, the node starts an etcd of its own",
        nargs="+",
    )
    etcd_user: str = option("", "etcd user")
    etcd_password: str = option("", "etcd password", secret=True)
    etcd_password_file: str = option("", "file with the etcd password")
    etcd_ca: str = option("", "file with the certificate authority of etcd's servers")
    etcd_cert: str = option("", "file with the client certificate for etcd")
    etcd_key: str = option("", "file with the key of the client certificate for etcd")
    etcd_timeout: SomeSeconds = option(
        1.5, "seconds that a call waits for an etcd member; less where --lease-ttl is too short"
    )
    lease_ttl: LeaseSeconds = option(6.0, "seconds after which a silent node has left the cluster")
    cluster_token: str = option(
        "", "secret of the peer channel (default: generated, and kept in etcd)", secret=True
    )
    cluster_token_file: str = option("", "file with the secret of the peer channel")
    state_dir: str = option(
        "", "folder for the embedded etcd's data and the engines' logs (default: user's state)"
    )
    engine: str = option(
        "vllm", "vllm, or sim: a modelled engine without weights", choices=("vllm", "sim")
    )
    sim_profile: str = option("instant", "step times of --engine sim")
    initial_instances: int = option(1, "instances that this node starts with")
    max_instances: int = option(8, "most instances on this node, whatever is desired in etcd")
    start_timeout: Seconds = option(
        600.0,
        "seconds within which an instance must be up, and for which a request waits for one that "
        "is starting when none is ready",
    )
    hang_timeout: SomeSeconds = option(
        3.0, "seconds for which an engine may be silent while its processes do nothing at all"
    )
    step_timeout: SomeSeconds = option(
        300.0, "seconds that an engine may compute without an answer"
    )
    failover_timeout: Seconds = option(
        30.0, "seconds that a request waits for an instance while none is ready, nor starting"
    )
    dispatch_policy: str = option(
        "load",
        "which instance gets a request: load (freeness while there is room, else what is lacking), "
        "freeness (the paper's formula), slo (the targets of its class), "
        "interference (long prompts where few run), memory "
        "(free blocks), queue (fewest waiting), balanced (fewest dispatched), rr, random, artifact "
        "(as the paper's evaluation ran), or the name of an entry point in llumnix.dispatch",
    )
    latency_profile: str = option(
        "",
        "how long steps take, for the policies that predict: a profile's name, or a YAML file with "
        "its coefficients in seconds",
    )
    dispatch_top_k: Several = option(1, "dispatch at random among the K best instances")
    priority_classes: str = option(
        "",
        "YAML file with the priority classes that requests may name; with it the engines schedule "
        "by priority, unless --scheduling-policy says otherwise",
    )
    migration: bool = option(
        True,
        "move running requests between instances, to balance them and to empty some",
        action=argparse.BooleanOptionalAction,
    )
    migration_policy: str = option(
        "queues",
        "between which instances requests move: queues (what waits goes first, and many at once; "
        "else the paper's rule), llumnix (the paper's rule alone), lookahead (the first that waits "
        "behind a blocked one), artifact, none, or an entry point in llumnix.rescheduling",
    )
    migration_interval: SomeSeconds = option(1.0, "seconds between two rounds of rescheduling")
    migration_out_below: float = option(
        3.0, "an instance gives requests away below this freeness, in KV blocks a request"
    )
    migration_in_above: float = option(
        3.0, "an instance takes requests above this freeness, in KV blocks a request"
    )
    migration_request: str = option(
        "low",
        "which request leaves: low (lowest priority, then shortest), LCR (last come, running), "
        "SR (shortest), LR (longest), FCR (first come, running), FCW (first come, waiting) or "
        "FCWSR (FCW, else SR)",
        choices=("low", "LCR", "SR", "LR", "FCR", "FCW", "FCWSR"),
    )
    migration_max_stages: Several = option(3, "most rounds of copying while a request decodes")
    migration_last_stage_max_blocks: Count = option(
        4, "full KV blocks that may be left to recompute when a request is handed over"
    )
    migration_tail_tokens: Count = option(
        4,
        "tokens beyond full blocks with which a request is handed over at once; with more of "
        "them its block is waited for",
    )
    migration_max_requests: Several = option(
        4, "requests that may leave an instance, and come to it, at a time"
    )
    migration_max_blocks: Count = option(
        0, "KV blocks of these together; 0: as many as the instance has room for"
    )
    migration_carrier: str = option(
        "auto",
        "how KV blocks go: memory (read in place, between instances of one machine; else as "
        "group), group (torch.distributed: NCCL between GPUs, Gloo between CPUs; else as host), "
        "host (Gloo, through the machines' memory) or auto (memory on GPUs, group on CPUs)",
        choices=("auto", "memory", "group", "host"),
    )
    migration_timeout: SomeSeconds = option(
        10.0, "seconds for each answer of a migration's other end, and for each transfer"
    )
    autoscale: bool = option(
        False,
        "while this node leads, add and remove instances in the cluster as the load asks for it",
        action=argparse.BooleanOptionalAction,
    )
    autoscale_low: float = option(
        10.0, "add instances below this mean freeness, in KV blocks a request"
    )
    autoscale_high: float = option(
        60.0, "remove one if the mean freeness is above this without it, in KV blocks a request"
    )
    autoscale_period: Seconds = option(
        10.0, "seconds for which the mean freeness must be out of this range"
    )
    autoscale_cooldown: Seconds = option(
        30.0, "seconds after a change in which no other instance is added or removed"
    )
    autoscale_min: int = option(1, "fewest instances in the cluster for --autoscale to go down to")
    autoscale_max: int = option(16, "most instances in the cluster for --autoscale to go up to")
    drain_timeout: Seconds = option(60.0, "seconds that running requests get to end at SIGTERM")
    max_requests: Count = option(
        2048, "requests open at this node, running or waiting; beyond them: 429; 0: no limit"
    )
    max_prompt_tokens: Count = option(
        0, "prompt tokens of the requests open at this node; beyond them: 429; 0: no limit"
    )
    send_timeout: Seconds = option(
        300.0, "seconds after which a client that reads nothing of its stream is cut off; 0: never"
    )
    grammar_timeout: SomeSeconds = option(
        2.0,
        "seconds of CPU that a request's grammar or schema may take to compile, in a process of "
        "its own before an engine has it; beyond them: 400",
    )
    max_body_bytes: Count = option(
        0,
        "largest request body, in bytes; beyond it: 413; 0: 4 MiB, or 26 MiB where prompts may "
        "hold images and sounds, or 16 bytes for each token of the model's context if that is more",
    )

    def resolved(self, host: str | None, port: int) -> "Config":
        """This configuration with every default that depends on the machine filled in.

        Raises ConfigError for values that contradict each other.
        """
        read = self._with_secrets()
        name = socket.gethostname()
        reachable = host if host not in (None, "", "0.0.0.0", "::") else None
        filled = dataclasses.replace(
            read,
            node=self.node or f"{re.sub(r'[^A-Za-z0-9.-]', '-', name)}-{port}",
            advertise_address=self.advertise_address or address(reachable or "127.0.0.1", port),
            state_dir=self.state_dir or default_state_dir(),
            etcd_endpoints=[e for item in self.etcd_endpoints or [] for e in item.split(",") if e],
        )
        filled.check()
        if not filled.etcd_endpoints or self.advertise_address or reachable:
            return filled
        # Nodes on other machines must find this one, and it listens on all addresses.
        return dataclasses.replace(filled, advertise_address=address(own_address(), port))

    def _with_secrets(self) -> "Config":
        """This with the secrets that files have."""
        found: dict[str, Any] = {}
        for one in option_fields():
            if not one.metadata.get("secret") or not (path := getattr(self, f"{one.name}_file")):
                continue
            if getattr(self, one.name):
                name = option_name(one)
                raise ConfigError(f"{name} and {name}-file are two of one kind: give one")
            try:
                found[one.name] = read_secret(f"{option_name(one)}-file", path)
            except SecretError as error:
                raise ConfigError(str(error)) from None
        return dataclasses.replace(self, **found)

    def check(self) -> None:
        """Raise ConfigError for the first option whose value cannot work."""
        check_bounds(self)
        if not 0 <= self.initial_instances <= self.max_instances:
            raise ConfigError(
                f"--initial-instances is {self.initial_instances}, but must lie between 0 and "
                f"--max-instances, which is {self.max_instances}"
            )
        if not self.migration_out_below <= self.migration_in_above:
            raise ConfigError(
                "--migration-out-below must not be above --migration-in-above: requests would go "
                "to and fro"
            )
        if self.open_admin and (self.admin_token or self.admin_address):
            raise ConfigError(
                "--open-admin lets everybody be an operator: it goes neither with --admin-token "
                "nor with --admin-address"
            )
        self._check_scaling()
        self._check_etcd()

    def _check_etcd(self) -> None:
        if bool(self.etcd_cert) != bool(self.etcd_key):
            raise ConfigError("--etcd-cert and --etcd-key go together")
        if bool(self.etcd_user) != bool(self.etcd_password):
            raise ConfigError("--etcd-user and --etcd-password go together")
        if (self.etcd_user or self.etcd_ca or self.etcd_cert) and not self.etcd_endpoints:
            raise ConfigError("--etcd-user and --etcd-ca need --etcd-endpoints")
        for endpoint in self.etcd_endpoints or ():
            if endpoint.startswith("unix:///"):  # that of another node's embedded etcd
                continue
            if not is_address(re.sub("^https?://", "", endpoint).removesuffix("/")):
                raise ConfigError(
                    "--etcd-endpoints must be host:port, http://host:port, https://host:port or "
                    f"unix:///path, not {endpoint!r}"
                )

    def _check_scaling(self) -> None:
        if not 0 < self.autoscale_low <= self.autoscale_high < math.inf:
            raise ConfigError(
                "--autoscale-low must be more than 0, and not above --autoscale-high, which is "
                f"{self.autoscale_high}"
            )
        if not 1 <= self.autoscale_min <= self.autoscale_max:
            raise ConfigError(
                "--autoscale-min must be 1 or more, and not above --autoscale-max, which is "
                f"{self.autoscale_max}"
            )


def option_fields() -> list[dataclasses.Field[Any]]:
    """Every option, in the order in which a reader meets them."""
    inherited = ServerOptions.__annotations__  # which dataclasses put first
    return sorted(dataclasses.fields(Config), key=lambda one: one.name in inherited)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options to a parser, in a group of their own."""
    group = parser.add_argument_group("llumnix", "One service out of many vLLM instances.")
    for one in option_fields():
        options = {k: v for k, v in one.metadata.items() if k not in ("help", "secret")}
        if "action" not in options:
            options["type"] = type(one.default) if one.default is not None else str
        if one.metadata.get("secret"):
            options["type"] = secret  # which argparse would have a default of "" go through, too
        default = "" if one.default in (None, "") else " (default: %(default)s)"
        group.add_argument(
            option_name(one),
            default=None if one.metadata.get("secret") else one.default,
            help=one.metadata["help"] + default,
            **options,
        )


def from_arguments(arguments: argparse.Namespace) -> Config:
    """The configuration that a parsed command line describes. Raises ConfigError."""
    values = {k.name: getattr(arguments, k.name) for k in dataclasses.fields(Config)}
    values |= {n: values[n] or "" for n in _secrets()}
    config = Config(**values).resolved(arguments.host, arguments.port)
    only_here = getattr(arguments, "uds", None) and not values["advertise_address"]
    if only_here and config.etcd_endpoints:
        raise ConfigError(
            "--uds with --etcd-endpoints needs --advertise-address: no other node can reach a "
            "socket file"
        )
    return config


def is_secret(name: str) -> bool:
    """Whether an option of that name, llumnix's or vLLM's, must not be printed."""
    return name in _secrets() or sounds_secret(name)


def _secrets() -> set[str]:
    return {k.name for k in dataclasses.fields(Config) if k.metadata.get("secret")}
