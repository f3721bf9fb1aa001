"""A look at JSON that costs little: how much a parser would have to do for it.

Text is cheap to parse, however long; millions of tiny objects are not. What stands outside of the
strings is counted here by functions that run over the bytes at the speed of memory.
"""

import re
from collections.abc import Sequence

import numpy as np

from llumnix.server.body_checks import limits

_SMALL = 32 * 1024  # a body of fewer bytes can't hold much, but it may be deep
_BLANK = b" \t\r\n"
_KEPT = b"[]{}"
_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
# What no JSON has outside of its strings, not even Python's, which takes NaN and Infinity.
_FOREIGN = re.compile(rb"[^\[\]{},:0-9+\-.eEtrufalsnNIity]")
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
    _measure([body], values, "the request body has")


def refuse_halves(text: bytes) -> None:
    """Raise TooMuch for JSON with half a surrogate pair, of which no text can be made."""
    if b"\\u" not in text:
        return
    text = text.replace(b"\\\\", b"")  # an escaped backslash, before which no u is an escape
    if _HALF.search(_PAIR.sub(b"", text)):
        raise TooMuch("a string of the request has half a surrogate pair, which is no character")


def scan_texts(texts: Sequence[bytes], values: int = limits.VALUES) -> None:
    """The same for texts within a body, of which each is parsed for itself: all together.

    Many are prose that only begins like JSON, as a log's `[INFO] …`: a parser goes no further than
    to the first sign that JSON has not, and so does this.
    """
    _measure(texts, values, "the JSON within strings of the request has", prose=True)


def _measure(texts: Sequence[bytes], values: int, has: str, prose: bool = False) -> None:
    if sum(map(len, texts)) <= _SMALL and not any(map(_may_be_deep, texts)):
        return
    containers = values // limits.VALUES_PER_CONTAINER
    outside = [_outside(text, 2 * (values + containers), has) for text in texts]
    if prose:
        ends = [_FOREIGN.search(text) for text in outside]
        outside = [
            text[: end.start()] if end else text for text, end in zip(outside, ends, strict=True)
        ]
    opened = [text.count(b"[") + text.count(b"{") for text in outside]
    items, keys = (sum(text.count(sign) for text in outside) for sign in (b",", b":"))
    if sum(opened) + keys > containers:
        raise TooMuch(f"{has} more than {containers} objects, arrays and keys")
    if items > values:
        raise TooMuch(f"{has} more than {values} values")
    if sum(map(len, outside)) > limits.VALUE_BYTES * (items + keys) + _SMALL:
        raise TooMuch(f"{has} numbers, or other words outside of strings, too long")
    for text, brackets in zip(outside, opened, strict=True):
        if brackets > limits.NESTING and _depth(text) > limits.NESTING:
            raise TooMuch(f"{has} more than {limits.NESTING} levels of objects and arrays")


def outside_strings(text: bytes) -> bytes:
    """What stands outside of the strings of JSON, without blanks."""
    return _outside(text, len(text))


def _may_be_deep(text: bytes) -> bool:
    return text.count(b"[") + text.count(b"{") > limits.NESTING


def _outside(body: bytes, quotes: int, has: str = "it has") -> bytes:
    """What stands outside of strings, without blanks."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # in this order: \\" ends a string
    if body.count(b'"') > quotes:
        raise TooMuch(f"{has} more than {quotes // 2} strings")
    return b"".join(body.split(b'"')[::2]).translate(None, _BLANK)


def _depth(outside: bytes) -> int:
    brackets = np.frombuffer(outside.translate(None, _NOT_KEPT), dtype=np.uint8)
    return int(np.cumsum(_STEPS[brackets], dtype=np.int32).max(initial=0))
