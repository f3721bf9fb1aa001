"""Forms: how many parts, how large, and what their fields say."""

import re
from typing import Any
from urllib.parse import parse_qsl

import orjson

from llumnix.server.body_checks import limits
from llumnix.server.body_checks.json_scan import TooMuch, scan_texts
from llumnix.server.body_checks.numbers import whole

_NAME = re.compile(rb"""(?i)(?:^|[;\s])name\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\s]*))""")
_CODED_NAME = re.compile(rb"(?i)(?:^|[;\s])name\s*\*")


def check_form(body: bytes) -> None:
    """Raise TooMuch for a form of many parts, which is read sign by sign."""
    if body[:2] != b"--":
        if len(body) > limits.FORM_HEAD_BYTES or body.count(b"&") >= limits.FORM_PARTS:
            raise TooMuch(
                f"a form must have at most {limits.FORM_PARTS} fields in "
                f"{limits.FORM_HEAD_BYTES} bytes; send files as multipart/form-data"
            )
        return
    halves = _halves(body)
    if len(halves) > limits.FORM_PARTS + 2:
        raise TooMuch(f"a form must have at most {limits.FORM_PARTS} parts")
    if sum(len(head) for head, _ in halves) > limits.FORM_HEAD_BYTES:
        raise TooMuch(
            f"the parts of a form must have at most {limits.FORM_HEAD_BYTES} bytes of headers"
        )
    if any(_CODED_NAME.search(head) for head, _ in halves):
        raise TooMuch("the names of a form's fields must be written as they are")
    # vllm_xargs is JSON; no sound and no image begins so.
    scan_texts([text for _, text in halves if text.lstrip(b" \t\r\n")[:1] in (b"{", b"[")])


def form_fields(body: bytes) -> dict[str, Any]:
    """What the fields of a checked form say, those of a JSON body that may cost much."""
    found: dict[str, Any] = {}
    for name, value in _fields(body):
        if name in limits.EXTRAS:
            try:
                found[name] = orjson.loads(value)
                continue
            except orjson.JSONDecodeError:
                pass  # the application words it better
        if name in limits.NAMES:
            # Of several, whichever vLLM takes is no more than this.
            found[name] = max(value, found.get(name, ""), key=lambda said: (whole(said), len(said)))
    return found


def _fields(body: bytes) -> list[tuple[str, str]]:
    if body[:2] != b"--":
        return parse_qsl(body.decode(errors="replace"), max_num_fields=limits.FORM_PARTS)
    fields = []
    for head, text in _halves(body):
        for match in _NAME.finditer(head):
            name = (match[1] or match[2] or b"").replace(b"\\", b"").decode(errors="replace")
            if name in limits.NAMES or name in limits.EXTRAS:
                fields.append((name, text.removesuffix(b"\r\n").decode(errors="replace")))
    return fields


def _halves(body: bytes) -> list[tuple[bytes, bytes]]:
    """The head and the content of each part."""
    boundary = body[: body.find(b"\r\n")] if b"\r\n" in body[:256] else body[:256]
    parts = body.split(boundary, limits.FORM_PARTS + 2)
    halves = (part.partition(b"\r\n\r\n") for part in parts)
    return [(head, text) for head, _, text in halves]
