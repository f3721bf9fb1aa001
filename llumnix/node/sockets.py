"""The listening sockets of a node whose API servers are processes: theirs, and one for nodes.

The node binds them, so they stay while a server is started again; who connects meanwhile is
answered by another server, or a moment later.
"""

import argparse
import asyncio
import os
import socket
from dataclasses import dataclass

from llumnix.addresses import address, parts
from llumnix.config import Config


@dataclass(frozen=True)
class Sockets:
    """What a node listens on."""

    public: list[socket.socket]  # where clients and operators come
    peer: socket.socket  # where nodes come, and the node's own API servers
    peer_address: str  # as they dial it

    @classmethod
    async def bind(cls, config: Config, arguments: argparse.Namespace) -> "Sockets":
        """Take the addresses; nobody is answered yet. Raises OSError if one is taken."""
        loop = asyncio.get_running_loop()
        public: list[socket.socket] = []
        if getattr(arguments, "uds", None):
            server = await loop.create_unix_server(
                asyncio.Protocol, arguments.uds, start_serving=False
            )
            public += _kept(server)
        else:
            public += await _bound(arguments.host, arguments.port)
        if config.admin_address:
            public += await _bound(*parts(config.admin_address))
        here, _ = parts(config.advertise_address)
        everywhere = "::" if ":" in here else "0.0.0.0"
        peer = (await _bound(arguments.host or everywhere, 0))[0]
        return cls(public, peer, address(here, peer.getsockname()[1]))

    def close(self) -> None:
        """Give the addresses up."""
        for one in (*self.public, self.peer):
            one.close()


async def _bound(host: str | None, port: int) -> list[socket.socket]:
    loop = asyncio.get_running_loop()
    return _kept(await loop.create_server(asyncio.Protocol, host, port, start_serving=False))


def _kept(server: asyncio.AbstractServer) -> list[socket.socket]:
    """The sockets of a server that does not serve, for others to use."""
    kept = [socket.socket(fileno=os.dup(one.fileno())) for one in getattr(server, "sockets", ())]
    server.close()
    return kept
