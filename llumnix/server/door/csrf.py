"""What protects operators from the web pages that their browsers show.

A page of any site can send requests to an address that its reader reaches. Whoever is an operator
by a token is safe from that, as no page knows it; who is one by where he calls from is not.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from aiohttp import hdrs, web

from llumnix.server.door.callers import Caller

_HOST = re.compile(r"(?:(?P<name>[^:\[\]]*)|\[(?P<v6>[^\[\]]+)\])(?::[0-9]{0,5})?")


@dataclass(frozen=True)
class Pages:
    """Which pages may call operators' routes, and all others for a caller known by his place."""

    origins: frozenset[str] = frozenset()  # of --allowed-origins; "*" opens nothing here
    hosts: frozenset[str] = field(default=frozenset({"localhost"}))  # names of this node

    @classmethod
    def of(cls, origins: Iterable[str], hosts: Iterable[str]) -> "Pages":
        """Of the options, with the names by which this node may be called beside `localhost`."""
        names = {name.lower() for name in hosts if name}
        return cls(frozenset(origins) - {"*"}, frozenset({"localhost"} | names))

    def refusal(self, request: web.Request, operator: Caller) -> tuple[int, str] | None:
        """The status and the sentence for what a page may not do; None: it may."""
        if (foreign := self.foreign(request, operator)) is not None:
            return foreign
        if request.body_exists and request.content_type != "application/json":
            return 415, "operators' routes take application/json as Content-Type"
        return None

    def foreign(self, request: web.Request, operator: Caller) -> tuple[int, str] | None:
        """The same, without a look at the kind of what it sends."""
        if operator.by_place and not self._is_ours(request):
            # A page may have had its own name resolved to this node's address.
            return 403, (
                "the Host header is none of this node's names; with an --admin-token any will do"
            )
        if not self._may(request):
            return 403, "pages of this Origin may not call operators' routes; see --allowed-origins"
        return None

    def named(self, request: web.Request) -> bool:
        """Whether it comes from a page that --allowed-origins names."""
        return _given(request, hdrs.ORIGIN) in self.origins

    def _may(self, request: web.Request) -> bool:
        origin = _given(request, hdrs.ORIGIN)
        if origin is None or origin in self.origins:
            return True
        own = f"{request.scheme}://{_given(request, hdrs.HOST) or ''}"
        return origin.lower() == own.lower()

    def _is_ours(self, request: web.Request) -> bool:
        given = _given(request, hdrs.HOST)
        if given is None:
            return True  # no browser leaves it out
        match = _HOST.fullmatch(given.lower())
        if match is None:
            return False
        if match["v6"] is not None:
            return _is_address(match["v6"].partition("%")[0])
        return match["name"] in self.hosts or _is_address(match["name"])


def _given(request: web.Request, header: str) -> str | None:
    """What a header says; of several, which no browser sends, what none says."""
    given = request.headers.getall(header, ())
    return given[0] if len(given) == 1 else ("" if given else None)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_preflight(request: web.Request) -> bool:
    """Whether a browser asks what a page may send; it shows no key with that."""
    asks = hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers and hdrs.ORIGIN in request.headers
    return request.method == hdrs.METH_OPTIONS and asks and not request.body_exists
