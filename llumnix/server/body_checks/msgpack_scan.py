"""What MessagePack says, without its bytes: read in bounded time, whatever it claims to hold.

A byte of it may be a value, and be ten times as costly to make as a byte of JSON.
"""

import struct
from dataclasses import dataclass
from typing import Any

from llumnix.server.body_checks import limits
from llumnix.server.body_checks.json_scan import TooMuch

RAW = 3  # vLLM's kind of an extension that is bytes; its others are pickles
_STRING_BYTES = 1024
_NUMBERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i"} | {
    **{0xD3: ">q", 0xCA: ">f", 0xCB: ">d"}
}
_LENGTHS = {  # what begins with this byte, and how its length is written
    **{0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I")},
    **{0xC7: ("extension", ">B"), 0xC8: ("extension", ">H"), 0xC9: ("extension", ">I")},
    **{0xD9: ("string", ">B"), 0xDA: ("string", ">H"), 0xDB: ("string", ">I")},
    **{0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")},
}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_WORDS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclass(frozen=True, slots=True)
class Bytes:
    """So many bytes."""

    size: int


class MsgpackScan:
    """Reads texts of MessagePack, which may have so many values together."""

    def __init__(self, values: int = limits.BINARY_VALUES) -> None:
        self._values = self._left = values
        self._data = b""
        self._at = 0

    def read(self, data: bytes) -> Any:
        """Its content, with `Bytes` for bytes.

        Raises TooMuch for too many values or levels, ValueError for what is not MessagePack, or
        has maps with other keys than strings, long strings, or extensions other than vLLM's bytes.
        """
        self._data, self._at = data, 0
        try:
            said = self._value(0)
        except (IndexError, struct.error) as error:
            raise ValueError("it ends too early") from error
        if self._at != len(data):
            raise ValueError("something follows it")
        return said

    def _value(self, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise TooMuch(f"binary data of the request has more than {self._values} values")
        first = self._data[self._at]
        self._at += 1
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 256
        if first in _WORDS:
            return _WORDS[first]
        if first in _NUMBERS:
            return self._number(_NUMBERS[first])
        if first in _FIXED_EXTENSIONS:
            return self._long("extension", _FIXED_EXTENSIONS[first], depth)
        if first in _LENGTHS:
            kind, form = _LENGTHS[first]
            return self._long(kind, self._number(form), depth)
        if first >= 0xA0:
            return self._long("string", first & 0x1F, depth)
        return self._long("array" if first >= 0x90 else "map", first & 0x0F, depth)

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return number

    def _long(self, kind: str, length: int, depth: int) -> Any:
        if kind in ("array", "map"):
            if depth >= limits.NESTING:
                most = limits.NESTING
                raise TooMuch(f"binary data of the request has more than {most} levels")
            if kind == "array":
                return [self._value(depth + 1) for _ in range(length)]
            return {self._key(depth): self._value(depth + 1) for _ in range(length)}
        if kind == "extension" and self._number(">b") != RAW:
            raise ValueError("it has an extension other than bytes")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise ValueError("it ends too early")
        if kind != "string":
            return Bytes(length)
        if length > _STRING_BYTES:
            raise ValueError(f"it has a string of more than {_STRING_BYTES} bytes")
        return self._data[start : self._at].decode()

    def _key(self, depth: int) -> str:
        key = self._value(depth + 1)
        if not isinstance(key, str):
            raise ValueError("it has a map with a key that is no string")
        return key
