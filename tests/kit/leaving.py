"""Clients over bare sockets, which leave in every way that there is."""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

HOST = "127.0.0.1"
SMALL = 4096  # bytes of a receive buffer that is soon full

WAYS = ("reset", "close", "half")  # a half-closed one keeps its own end open, and reads nothing


def head(method: str, path: str, headers: Mapping[str, str], version: str = "1.1") -> bytes:
    """The head of a request."""
    lines = [f"{method} {path} HTTP/{version}", "Host: here"]
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items()), "", ""]).encode()


def post(path: str, body: Any, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole request with a JSON body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    more = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    return head("POST", path, more | dict(headers or {})) + data


class Client:
    """One connection."""

    def __init__(self, port: int, buffer: int = 0) -> None:
        """`buffer`: bytes of its receive buffer, if that is to be small."""
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(30)
        self.socket.connect((HOST, port))

    def send(self, data: bytes) -> "Client":
        self.socket.sendall(data)
        return self

    def read(self, size: int = 65536) -> bytes:
        """What is there next; empty at the end of the connection, however it ended."""
        try:
            return self.socket.recv(size)
        except ConnectionResetError:
            return b""

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        return b"".join(iter(self.read, b""))

    def some(self, size: int) -> bytes:
        """As many bytes, unless the connection ends before."""
        got = b""
        while len(got) < size and (more := self.read()):
            got += more
        return got

    def leave(self, way: str) -> None:
        """Go away in one of the WAYS."""
        if way == "half":
            self.socket.shutdown(socket.SHUT_WR)
            return
        if way == "reset":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()
