"""The access log, and how much of what a caller has sent any line of a log shows."""

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

SHOWN = 200  # characters of one line that are a caller's


def shown(text: str, most: int = SHOWN) -> str:
    """What a log shows of a caller's text: its beginning, with whatever is not printable escaped.

    A path is decoded when it gets here, and may hold line ends, and what moves a terminal's cursor.
    """
    if len(text) <= most and text.isascii() and text.isprintable():
        return text
    seen = text[:most].encode("unicode_escape").decode()
    if len(seen) <= most and len(text) <= most:
        return seen
    return f"{seen[:most]}… ({len(text)} characters)"


class AccessLog(AbstractAccessLogger):
    """A line for each request that has been answered."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Say who has asked for what, the status, the bytes of the answer, and how long it took."""
        version = f"HTTP/{request.version.major}.{request.version.minor}"
        self.logger.info(
            '%s "%s %s %s" %d %d %.6fs',
            *(request.remote or "-", shown(request.method, 20), shown(request.path_qs), version),
            *(response.status, response.body_length, time),
        )
