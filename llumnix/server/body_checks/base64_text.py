"""Binary data that stands as base64 in a text, and is looked at without undoing all of it."""

import pybase64


class Base64Text:
    """Reads any bytes of a base64 text, at the cost of those bytes alone.

    Four signs are three bytes wherever they stand, so what is at the end of megabytes is had
    without the megabytes.
    """

    def __init__(self, text: str) -> None:
        """Raises ValueError for a text that can't be base64 by its length."""
        if len(text) % 4:
            raise ValueError("base64 has four signs for three bytes")
        self._text = text
        padding = len(text[-2:]) - len(text[-2:].rstrip("="))
        self.size = len(text) // 4 * 3 - padding

    def read(self, start: int, count: int) -> bytes:
        """These bytes, or fewer at the end. Raises ValueError for signs that are not base64."""
        if start < 0 or count <= 0:
            return b""
        first, last = start // 3, -(-(start + count) // 3)
        part = pybase64.b64decode(self._text[first * 4 : last * 4], validate=True)
        return part[start - first * 3 :][:count]

    def whole(self) -> bytes:
        """All bytes. Raises ValueError if any sign is not base64: some decoders skip it."""
        return pybase64.b64decode(self._text, validate=True)
