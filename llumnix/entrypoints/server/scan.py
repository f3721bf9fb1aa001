"""A look at JSON that costs little: how much a parser would have to do for it.

Text is cheap to parse, however long; millions of tiny objects are not. What stands outside of the
strings is counted here by functions that run over the bytes at the speed of memory.
"""

import numpy as np

from llumnix.entrypoints.server import limits

_SMALL = 32 * 1024  # a body of fewer bytes can't hold much, but it may be deep
_BLANK = b" \t\r\n"
_KEPT = b"[]{}"
_NOT_KEPT = bytes(set(range(256)) - set(_KEPT))
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[[*b"[{"]] = 1
_STEPS[[*b"]}"]] = -1


class TooMuch(Exception):
    """A body that no parser is to see; the message says why, such as what is too much in it."""


def scan(body: bytes, values: int = limits.VALUES) -> None:
    """Raise TooMuch for JSON with too many values, objects or levels, or too long numbers.

    It need not be JSON: what is none is left to the parser, unless it has too much of the signs.
    """
    if b"\0" in body:  # as in UTF-16, which Python's parser takes, and in which signs hide
        raise TooMuch("the request body must be JSON in UTF-8")
    if len(body) <= _SMALL and body.count(b"[") + body.count(b"{") <= limits.NESTING:
        return
    outside = _outside(body, 2 * (values + limits.CONTAINERS))
    opened = outside.count(b"[") + outside.count(b"{")
    items, keys = outside.count(b","), outside.count(b":")
    if opened + keys > limits.CONTAINERS:
        raise TooMuch(
            f"the request body has more than {limits.CONTAINERS} objects, arrays and keys"
        )
    if items > values:
        raise TooMuch(f"the request body has more than {values} values")
    if len(outside) > limits.VALUE_BYTES * (items + keys) + _SMALL:
        raise TooMuch("the request body has numbers, or other words outside of strings, too long")
    if opened > limits.NESTING and _depth(outside) > limits.NESTING:
        raise TooMuch(f"the request body is nested more than {limits.NESTING} levels deep")


def _outside(body: bytes, quotes: int) -> bytes:
    """What stands outside of strings, without blanks."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # in this order: \\" ends a string
    if body.count(b'"') > quotes:
        raise TooMuch(f"the request body has more than {quotes // 2} strings")
    return b"".join(body.split(b'"')[::2]).translate(None, _BLANK)


def _depth(outside: bytes) -> int:
    brackets = np.frombuffer(outside.translate(None, _NOT_KEPT), dtype=np.uint8)
    return int(np.cumsum(_STEPS[brackets], dtype=np.int32).max(initial=0))
