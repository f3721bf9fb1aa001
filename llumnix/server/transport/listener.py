"""The listening socket of a node: plain or TLS, by vLLM's own arguments."""

import argparse
import asyncio
import dataclasses
import logging
import ssl
from collections.abc import Callable, Sequence
from socket import socket

from aiohttp import web

from llumnix.addresses import parts
from llumnix.config import ConfigError
from llumnix.server.access_log import AccessLog
from llumnix.server.transport.acceptor import Acceptor
from llumnix.server.transport.connection_places import Limits
from llumnix.server.transport.connections import Doors
from llumnix.server.transport.unfinished_heads import PIECE

BACKLOG = 2048  # connections that may wait to be accepted, as at vLLM's server

VLLM_HEAD_BYTES = 4 * 2**20  # vLLM's default of a head, which is more than anybody needs
READ_AHEAD = 64 * 1024  # bytes of a body that are taken before anybody reads it
LINGER = 2.0  # seconds in which a client may send the rest of a body that was refused
SHUTDOWN = 2.0  # seconds for handlers to end when the node does

access_log = logging.getLogger("llumnix.access")


class Listener:
    """Runs the application on --host and --port (or --uds)."""

    def __init__(
        self,
        app: web.Application,
        arguments: argparse.Namespace,
        limits: Limits | None = None,
        admin_address: str = "",
        gives_way: Callable[[], bool] = lambda: False,
    ) -> None:
        """`admin_address`: host:port of a second socket; the application tells the two apart.
        `gives_way`: whether another process on the same sockets is to have the next connection."""
        self._gives_way = gives_way
        self._app = web.AppRunner(app)
        self._arguments = arguments
        limits = limits or Limits()
        longest = arguments.h11_max_incomplete_event_size  # bytes; vLLM's limit of all headers
        if longest != VLLM_HEAD_BYTES:
            limits = dataclasses.replace(limits, head_bytes=longest)
        self._limits = limits
        self._admin_address = admin_address
        quiet = getattr(arguments, "disable_uvicorn_access_log", False)
        self._options = {
            "access_log": None if quiet else access_log,
            "access_log_class": AccessLog,
            # The connection refuses heads before the parser does, which knows single lines.
            "max_line_size": limits.head_bytes + PIECE,
            "max_field_size": limits.head_bytes + PIECE,
            "max_headers": arguments.h11_max_header_count,
            "auto_decompress": False,  # a few bytes could become any number
            "read_bufsize": READ_AHEAD,
            "lingering_time": LINGER,
            "keepalive_timeout": self._limits.idle_timeout + 60.0,  # which ends them before
        }
        self._doors: Doors | None = None
        self._acceptor: Acceptor | None = None
        self._bound: list[asyncio.AbstractServer] = []  # which keep the addresses, and no more
        self._watching: asyncio.Task[None] | None = None

    async def open(self, sockets: Sequence[socket] = ()) -> None:
        """Begin to listen: on sockets that others have bound, or at the addresses.

        Raises OSError if an address is taken.
        """
        await self._app.setup()
        assert self._app.server is not None
        self._doors = Doors(self._app.server, self._limits, **self._options)
        loop = asyncio.get_running_loop()
        arguments = self._arguments
        self._acceptor = Acceptor(
            *(self._doors, _server_ssl(arguments), self._limits.header_timeout), self._gives_way
        )
        if sockets:
            for given in sockets:
                server = loop.create_server(self._doors, sock=given, start_serving=False)
                self._bound.append(await server)
        elif getattr(arguments, "uds", None):
            self._bound.append(
                await loop.create_unix_server(self._doors, arguments.uds, start_serving=False)
            )
        else:
            await self._bind(arguments.host, arguments.port)
        if self._admin_address and not sockets:
            await self._bind(*parts(self._admin_address))
        for bound in self._bound:
            self._acceptor.listen(bound, BACKLOG)
        self._watching = loop.create_task(self._doors.watch(), name="connections")

    async def _bind(self, host: str | None, port: int) -> None:
        assert self._doors is not None
        loop = asyncio.get_running_loop()
        self._bound.append(await loop.create_server(self._doors, host, port, start_serving=False))

    async def refuse_new(self) -> None:
        """Close the listening sockets; open connections go on."""
        if self._acceptor is not None:
            self._acceptor.refuse_new()
        for bound in self._bound:
            bound.close()

    async def close(self) -> None:
        """Close everything."""
        await self.refuse_new()
        if self._acceptor is not None:
            await self._acceptor.close()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._doors is not None:
            await asyncio.sleep(0)  # for requests that have just come to have a handler
            self._doors.pre_shutdown()
            await self._doors.shutdown(SHUTDOWN)
        await self._app.cleanup()

    @staticmethod
    def client_ssl(arguments: argparse.Namespace) -> ssl.SSLContext | None:
        """How this node's peers are to be verified; None without TLS."""
        if not arguments.ssl_certfile:
            return None
        # Given an authority, no other one that the system knows may vouch for a node.
        context = ssl.create_default_context(cafile=arguments.ssl_ca_certs)
        if not arguments.ssl_ca_certs:
            _trust(context, arguments)
        if _client_certificates(arguments) != ssl.CERT_NONE:
            context.load_cert_chain(arguments.ssl_certfile, arguments.ssl_keyfile)
        return context


def _server_ssl(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    if not arguments.ssl_certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(arguments.ssl_certfile, arguments.ssl_keyfile)
    # Each costs as much as a handshake; OpenSSL allows none from 3.0 on, unless it is told to.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.verify_mode = _client_certificates(arguments)
    if context.verify_mode != ssl.CERT_NONE:
        _trust(context, arguments)
    if arguments.ssl_ciphers:
        context.set_ciphers(arguments.ssl_ciphers)
    return context


def _client_certificates(arguments: argparse.Namespace) -> ssl.VerifyMode:
    """Whether clients must, may or need not show a certificate."""
    try:
        return ssl.VerifyMode(arguments.ssl_cert_reqs)
    except ValueError:
        raise ConfigError(
            f"--ssl-cert-reqs is {arguments.ssl_cert_reqs}, but must be 0 (none), 1 (optional) "
            "or 2 (required)"
        ) from None


def _trust(context: ssl.SSLContext, arguments: argparse.Namespace) -> None:
    """Accept what --ssl-ca-certs has signed; without it, the nodes' common certificate itself."""
    context.load_verify_locations(arguments.ssl_ca_certs or arguments.ssl_certfile)
    if not arguments.ssl_ca_certs:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be its own authority
