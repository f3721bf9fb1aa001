"""Who sends a request: an operator, a client by its name, or a stranger."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from aiohttp import hdrs, web

from llumnix.server.door.keyring import digest

# Headers by which proxies and the networks in front of them say for whom they ask, or that they do.
_OF_A_PROXY = re.compile(
    r"(?:.*-)?forwarded(?:-.*)?|.*(?:client|real|connecting|remote|originating|user)-?ip(?:v6)?"
    r"|(?:cf|fastly|fly|x-envoy|x-original|x-arr|x-amz-cf|x-azure|x-appengine|x-vercel|x-proxy"
    r"|tailscale|ngrok|proxy)-.*"
    r"|via|cdn-loop|x-amzn-trace-id|x-remote-addr|x-host"
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, and what it may do."""

    name: str
    operator: bool = False
    # Known by where it calls from, not by what it shows: a web page can call from there, too.
    by_place: bool = False


CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)
# Has vLLM tell a node's load with the answer, for which it collects all metrics on the loop.
ASKS_FOR_LOAD = "endpoint-load-metrics-format"
# Whether one who asks may know it: a client otherwise learns nothing of others.
SEES_LOAD: web.RequestKey[bool] = web.RequestKey("sees_load", bool)

ANYONE = Caller("anyone")
OPERATOR = Caller("operator", operator=True)
LOCAL = Caller("operator", operator=True, by_place=True)


class AcceptedKeys(Protocol):
    """Something that knows keys by their digests."""

    def name(self, shown: bytes) -> str | None:
        """Whose key it is; None: nobody's."""
        ...


@dataclass(frozen=True)
class Callers:
    """Tells callers apart, by their key and, where no key is set, by where they call from."""

    clients: Sequence[AcceptedKeys] = ()
    operators: AcceptedKeys | None = None
    admin_port: int | None = None  # of --admin-address, where alone operators' routes answer then
    open_admin: bool = False  # whether everybody is an operator

    def caller(self, request: web.Request) -> Caller | None:
        """Who sends this; None: a stranger. An operator by place is only told by `operator`."""
        shown = _shown(request)
        if shown is not None:
            if self.operators is not None and self.operators.name(shown) is not None:
                return OPERATOR
            for keys in self.clients:
                if (name := keys.name(shown)) is not None:
                    return Caller(name)
        if not self.clients:
            return ANYONE
        return LOCAL if self.operators is None and self._at_admin(request) else None

    def operator(self, request: web.Request, caller: Caller | None) -> Caller | None:
        """The caller as an operator; None if it is none, or if this is not the door for them."""
        if self.admin_port is not None and not self._at_admin(request):
            return None
        if caller is not None and caller.operator:
            return caller
        if self.operators is not None:
            return None
        if self.admin_port is not None:
            return LOCAL
        if self.open_admin:
            return OPERATOR
        return LOCAL if not self.clients and is_local(request) else None

    def why_not(self, request: web.Request, caller: Caller | None) -> tuple[int, str]:
        """The status and the sentence for one who is no operator here."""
        if self.admin_port is not None and not self._at_admin(request):
            return 403, "this route answers at the node's --admin-address only"
        if caller is not None and caller is not ANYONE:
            return 403, "this route is for operators, and the key shown is a client's"
        if self.operators is None:
            return 403, (
                "this route is for operators: without --admin-token it answers on the node's own "
                "machine alone"
            )
        return 401, "this route is for operators: show their token as Authorization: Bearer <token>"

    def _at_admin(self, request: web.Request) -> bool:
        name = _socket(request, "sockname")
        return isinstance(name, tuple) and name[1] == self.admin_port


def who(request: web.Request) -> str:
    """By what a request's caller is told from others: its key's name, or where it calls from."""
    caller = request.get(CALLER, ANYONE)
    return request.remote or "" if caller is ANYONE else caller.name


def is_local(request: web.Request) -> bool:
    """Whether a request comes from this machine, and not through a proxy that says so."""
    if any(_OF_A_PROXY.fullmatch(name.lower()) for name in request.headers):
        return False
    peer = _socket(request, "peername")
    if not isinstance(peer, tuple):
        return isinstance(_socket(request, "sockname"), str)  # a socket file, --uds
    address = ipaddress.ip_address(peer[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _socket(request: web.Request, which: str) -> object:
    return request.transport.get_extra_info(which) if request.transport else None


def _shown(request: web.Request) -> bytes | None:
    """The digest of the key that a request shows; None without one, or with several."""
    given = request.headers.getall(hdrs.AUTHORIZATION, ())
    if len(given) != 1:
        return None
    scheme, _, key = given[0].partition(" ")
    return digest(key) if scheme.lower() == "bearer" else None
