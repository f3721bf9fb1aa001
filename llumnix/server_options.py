"""The options of a node's HTTP server: who may call it, and what its connections may take."""

import argparse
from dataclasses import dataclass

from llumnix.option_fields import Address, Count, Seconds, SomeSeconds, option


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Who may call a node, beside vLLM's --api-key, and what its clients may take."""

    max_connections: Count = option(
        0,
        "connections open at this node; beyond them those without a request give way, and then new "
        "ones get 503, but probes and nodes have places of their own; 0: what descriptors allow",
    )
    peer_address: Address = option(
        "",
        "host:port at which other nodes reach this one where it has several API servers (default: "
        "any free port at the host of --advertise-address)",
    )
    header_timeout: SomeSeconds = option(
        10.0, "seconds within which the head of a request must be there, from its first byte"
    )
    body_timeout: SomeSeconds = option(
        60.0, "seconds within which the body of a request must be there"
    )
    idle_timeout: Seconds = option(
        0.0,
        "seconds after which a connection without a request is closed; 0: as "
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE says, and 75 without it, longer than proxies keep theirs",
    )
    body_budget: Count = option(
        512 * 2**20,
        "bytes of all request bodies that are being read or answered at a time, not counting the "
        "first 64 KiB of each; beyond them: 429; 0: no limit",
    )
    media_budget: Count = option(
        4 * 2**30,
        "bytes of the images, sounds and videos of all requests that are decoded at a time; "
        "beyond them they wait for each other, for 10 s at most, and get 503; 0: no limit",
    )
    api_key_file: str = option(
        "",
        "file with the keys of clients, name:key in each line, beside those of --api-key; read "
        "again when it changes",
    )
    admin_token: str = option(
        "",
        "secret that operators show (default: generated if clients need a key, kept in etcd, and "
        "written to a file in --state-dir)",
        secret=True,
    )
    admin_token_file: str = option("", "file with the secret that operators show")
    admin_address: Address = option(
        "",
        "host:port at which alone operators' routes answer, to anybody who reaches it unless there "
        "is an --admin-token",
    )
    open_admin: bool = option(
        False,
        "let everybody who reaches this node be an operator: drain it, reset it, see all requests",
        action=argparse.BooleanOptionalAction,
    )
    public_metrics: bool = option(
        False, "let everybody read /metrics", action=argparse.BooleanOptionalAction
    )
    public_status: bool = option(
        False, "let everybody read /status", action=argparse.BooleanOptionalAction
    )
