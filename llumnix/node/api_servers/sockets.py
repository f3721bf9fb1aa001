"""The listening sockets of a node whose API servers are processes: theirs, and one for nodes.

The node binds them, so they stay while a server is started again; who connects meanwhile is
answered by another server, or a moment later.
"""

import argparse
import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from llumnix.addresses import address, parts
from llumnix.config import Config


@dataclass(frozen=True)
class Sockets:
    """What a node listens on."""

    public: list[socket.socket]  # where clients and operators come
    peer: socket.socket  # where other nodes come
    peer_address: str  # as they dial it
    own: socket.socket  # where this node's API servers come: a socket file
    own_path: str

    @classmethod
    async def bind(cls, config: Config, arguments: argparse.Namespace, folder: Path) -> "Sockets":
        """Take the addresses; nobody is answered yet. `folder`: the node's own, for a socket file.

        Raises OSError if one is taken.
        """
        public: list[socket.socket] = []
        if path := getattr(arguments, "uds", None):
            public.append(_file(path))
        else:
            public += await _bound(arguments.host, arguments.port)
        if config.admin_address:
            public += await _bound(*parts(config.admin_address))
        own_path = str(folder / "servers")
        peer, where = await _peer(config, arguments)
        return cls(public, peer, where, _file(own_path), own_path)

    def close(self) -> None:
        """Give the addresses up."""
        for one in (*self.public, self.peer, self.own):
            one.close()


async def _peer(config: Config, arguments: argparse.Namespace) -> tuple[socket.socket, str]:
    """A socket for other nodes, and its address: as --peer-address says, or else any port."""
    here, _ = parts(config.advertise_address)
    where, port = parts(config.peer_address) if config.peer_address else (here, 0)
    only_here = arguments.host is None and where in ("127.0.0.1", "::1", "localhost")
    everywhere = where if only_here else "::" if ":" in where else "0.0.0.0"
    peer = (await _bound(arguments.host or everywhere, port))[0]
    return peer, address(where, peer.getsockname()[1])


def _file(path: str) -> socket.socket:
    """A socket file, in place of one that is left from before."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(path)
    return bound


async def _bound(host: str | None, port: int) -> list[socket.socket]:
    loop = asyncio.get_running_loop()
    return _kept(await loop.create_server(asyncio.Protocol, host, port, start_serving=False))


def _kept(server: asyncio.AbstractServer) -> list[socket.socket]:
    """The sockets of a server that does not serve, for others to use."""
    kept = [socket.socket(fileno=os.dup(one.fileno())) for one in getattr(server, "sockets", ())]
    server.close()
    return kept
