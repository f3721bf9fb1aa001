"""What protects operators from the web pages that their browsers show.

A page of any site can send requests to an address that its reader reaches. Whoever is an operator
by a token is safe from that, as no page knows it; who is one by where he calls from is not.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from llumnix.entrypoints.server.callers import Caller


@dataclass(frozen=True)
class Pages:
    """Which pages may call operators' routes."""

    origins: frozenset[str] = frozenset()  # of --allowed-origins; "*" opens nothing here
    hosts: frozenset[str] = field(default=frozenset({"localhost"}))  # names of this node

    @classmethod
    def of(cls, origins: Iterable[str], hosts: Iterable[str]) -> "Pages":
        """Of the options, with the names by which this node may be called beside `localhost`."""
        names = {name.lower() for name in hosts if name}
        return cls(frozenset(origins) - {"*"}, frozenset({"localhost"} | names))

    def refusal(self, request: web.Request, operator: Caller) -> tuple[int, str] | None:
        """The status and the sentence for what a page may not do; None: it may."""
        if operator.by_place and not self._is_ours(request):
            # A page may have had its own name resolved to this node's address.
            return 403, (
                "the Host header is none of this node's names; with an --admin-token any will do"
            )
        if not self._may(request):
            return 403, "pages of this Origin may not call operators' routes; see --allowed-origins"
        if request.body_exists and request.content_type != "application/json":
            return 415, "operators' routes take application/json as Content-Type"
        return None

    def named(self, request: web.Request) -> bool:
        """Whether it comes from a page that --allowed-origins names."""
        return request.headers.get(hdrs.ORIGIN) in self.origins

    def _may(self, request: web.Request) -> bool:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or origin in self.origins:
            return True
        return origin.partition("://")[2].lower() == request.headers.get(hdrs.HOST, "").lower()

    def _is_ours(self, request: web.Request) -> bool:
        given = request.headers.get(hdrs.HOST)
        if given is None:
            return True  # no browser leaves it out
        try:
            host = urlsplit(f"//{given}").hostname or ""
        except ValueError:
            return False
        return host in self.hosts or _is_address(host)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_preflight(request: web.Request) -> bool:
    """Whether a browser asks what a page may send; it shows no key with that."""
    asks = hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers and hdrs.ORIGIN in request.headers
    return request.method == hdrs.METH_OPTIONS and asks and not request.body_exists
