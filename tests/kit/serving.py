"""A node's listening socket with a small application behind it, in the test's own process."""

import argparse
import contextlib
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from aiohttp import web

from llumnix.metrics import CLOSED, CONNECTIONS
from llumnix.server.errors import openai_errors
from llumnix.server.transport.connection_places import Limits
from llumnix.server.transport.listener import Listener
from tests.kit.etcd import free_ports


def closed(reason: str) -> float:
    """How many connections this process has ended for that reason."""
    value: float = CLOSED.labels(reason)._value.get()
    return value


def opened() -> float:
    """How many connections are open in this process."""
    value: float = CONNECTIONS._value.get()
    return value


def self_signed(folder: Path) -> dict[str, str]:
    """A certificate that is made there, as vLLM's options name it."""
    paths = {"ssl_certfile": f"{folder}/cert.pem", "ssl_keyfile": f"{folder}/key.pem"}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=node"]
    command += ["-keyout", paths["ssl_keyfile"], "-out", paths["ssl_certfile"]]
    subprocess.run(command, check=True, capture_output=True)
    return paths


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    limits: Limits | None = None,
    max_body: int = 1 << 20,
    **options: object,
) -> AsyncIterator[int]:
    """The port of a server, with vLLM's own options of it, such as `ssl_certfile`."""
    app = web.Application(client_max_size=max_body, middlewares=[openai_errors])
    app.router.add_route("*", "/{path:.*}", handler)
    tls = dict.fromkeys(("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ciphers", "uds"))
    heads = {"h11_max_incomplete_event_size": 4 << 20, "h11_max_header_count": 256}
    (port,) = free_ports(1)
    values = {"host": "127.0.0.1", "port": port, "ssl_cert_reqs": 0} | tls | heads | options
    listener = Listener(app, argparse.Namespace(**values), limits)
    await listener.open()
    try:
        yield port
    finally:
        await listener.close()
