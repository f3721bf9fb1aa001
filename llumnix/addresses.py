"""Addresses as options have them: host:port, with an IPv6 address in brackets."""

import re
import socket

_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s/:@\[\]]+):(?P<port>[0-9]{1,5})")


def is_address(text: str) -> bool:
    """Whether it is host:port, where an IPv6 address stands in brackets."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and 0 < int(found["port"]) < 2**16


def address(host: str, port: int) -> str:
    """The two as one text."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parts(text: str) -> tuple[str, int]:
    """Host, without brackets, and port of an address."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def own_address() -> str:
    """The address by which this machine reaches others; no packet is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation range: only the route matters
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
