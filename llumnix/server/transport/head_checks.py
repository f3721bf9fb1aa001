"""What the head of a request may not ask for, looked at before any route hears of it."""

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion, HttpVersion10

from llumnix.dataplane.peer import PATH as PEER
from llumnix.server.errors import error_response

_NEWEST = HttpVersion(1, 1)
TARGET_BYTES = 8 * 1024  # of a path with its query, as other servers have it
# Of a path. aiohttp looks for its route at each of them, which takes as long as what is before it.
TARGET_PARTS = 64
# It becomes part of a request's id, which is in logs, in frames between nodes, and in etcd's keys.
REQUEST_ID = "X-Request-Id"
REQUEST_ID_SIZE = 256
# What these take to read grows with the square of their length: 6 s for 30 KB. No name is longer.
HOST_SIZE = 255 + len(":65535")
TYPE_SIZE = 256
# Where another protocol than HTTP may be asked for: what comes behind that can't be parsed.
UPGRADES = (PEER, "/v1/realtime")


def problem(request: web.BaseRequest) -> web.Response | None:
    """The answer to a head that a server of HTTP/1.1 can't go by; None if it can."""
    found = _found(request)
    if found is None:
        return None
    response = error_response(*found)
    response.force_close()
    return response


def is_request_id(text: str) -> bool:
    """Whether a client may call its request so."""
    return len(text) <= REQUEST_ID_SIZE and text.isascii() and text.isprintable()


def _found(request: web.BaseRequest) -> tuple[int, str] | None:
    if not HttpVersion10 <= request.version <= _NEWEST:
        return 505, "this server speaks HTTP/1.1 and HTTP/1.0"
    target = request.raw_path
    if len(target) > TARGET_BYTES:
        return 414, f"a path and its query may have {TARGET_BYTES} bytes together"
    if target.partition("?")[0].count("/") > TARGET_PARTS:
        return 414, f"a path may have {TARGET_PARTS} parts"
    if _upgrades(request) and not request.path.rstrip("/").endswith(UPGRADES):
        return 400, "at this path there is no upgrade to another protocol"
    headers = request.headers
    if any(len(h) > HOST_SIZE or not h.isascii() for h in headers.getall(hdrs.HOST, ())):
        return 400, f"Host must have at most {HOST_SIZE} ASCII characters"
    if any(len(kind) > TYPE_SIZE for kind in headers.getall(hdrs.CONTENT_TYPE, ())):
        return 400, f"Content-Type must have at most {TYPE_SIZE} characters"
    codings = headers.getall(hdrs.TRANSFER_ENCODING, None)
    if codings is not None and [coding.strip().lower() for coding in codings] != ["chunked"]:
        # As with Content-Encoding: nothing is undone here, and what was coded twice is no JSON.
        return 501, "of all kinds of Transfer-Encoding this server takes chunked alone"
    if REQUEST_ID in headers and not all(map(is_request_id, headers.getall(REQUEST_ID))):
        return 400, f"{REQUEST_ID} must have at most {REQUEST_ID_SIZE} printable ASCII characters"
    if (expected := headers.get(hdrs.EXPECT)) is not None:  # 100-continue has been taken out
        return 417, f"this server can't meet the expectation {expected[:40]!r}"
    return None


def _upgrades(request: web.BaseRequest) -> bool:
    """Whether what follows is taken for another protocol; of those it knows not, nobody minds."""
    if request.method == hdrs.METH_CONNECT:
        return True
    wanted = request.headers.get(hdrs.UPGRADE, "").lower()
    return bool(request._message.upgrade) and wanted in ("websocket", "tcp")
