"""JSON within the strings of a body, which vLLM parses on the loop once it has the body itself.

The arguments of a tool's call in a chat's history are such a string, and so are the schemas of
structured outputs, if a client sends them as text. Some models' templates take a tool's result for
JSON if it can be read as that. They are measured together, as a body is.
"""

import json
from collections.abc import Iterator
from typing import Any

import orjson

from llumnix.server.body_checks import limits
from llumnix.server.body_checks.json_scan import TooMuch, refuse_halves, scan_texts

# Fields whose strings are parsed, wherever they are.
PARSED = frozenset({"arguments", "json", "structural_tag", "tools", "vllm_xargs"})
# Fields whose strings may be, in what a tool has said.
_RESULTS = frozenset({"content", "text", "output"})
_TOOLS = frozenset({"tool", "function", "tool_result", "function_call_output"})
_LONGEST = max(map(len, _TOOLS))
_BLANKS = b" \t\r\n"
_BEGINNINGS = (b"{", b"[", b'"')  # of what is parsed further than its first word
_LAYERS = 2  # of strings within strings that a parser looks into


def check_strings(said: Any, values: int = limits.VALUES) -> None:
    """Raise TooMuch for what a body says if strings in it hold too much JSON."""
    texts: list[str] = []
    _find(said, PARSED, texts)
    if texts:
        whole = [text.encode(errors="surrogatepass") for text in texts]
        layers = [text for outer in whole for text in _layers(outer)]
        scan_texts(layers, values)
        for text in layers:
            _refuse_halves(text)


def written(value: Any) -> bytes:
    """A value in JSON."""
    try:
        return orjson.dumps(value)
    except TypeError:  # half a surrogate, or a large number
        return json.dumps(value).encode()


def _refuse_halves(text: bytes) -> None:
    """Raise TooMuch for half a surrogate pair, if the text is JSON: in prose it is only written."""
    try:
        refuse_halves(text)
    except TooMuch:
        try:
            json.loads(text)
        except ValueError:
            return
        raise


def _find(part: Any, names: frozenset[str], found: list[str]) -> None:
    """Add the strings that may be parsed: those under these names, and what tools have said."""
    if type(part) is list:
        for inner in part:
            if type(inner) is dict or type(inner) is list:
                _find(inner, names, found)
    elif type(part) is dict:
        if _is_of_a_tool(part.get("role")) or _is_of_a_tool(part.get("type")):
            names = PARSED | _RESULTS
        for name, value in part.items():
            if type(value) is str:
                if name in names:
                    found.append(value)
            elif type(value) is dict or type(value) is list:
                _find(value, names, found)


def _is_of_a_tool(kind: Any) -> bool:
    return type(kind) is str and len(kind) <= _LONGEST and kind.lower() in _TOOLS


def _layers(text: bytes) -> Iterator[bytes]:
    """A string, and those that it is the JSON of: some models' arguments come twice encoded."""
    for _ in range(_LAYERS + 1):
        first = text[:1] if text[:1] not in _BLANKS else text.lstrip(_BLANKS)[:1]
        if first in _BEGINNINGS:
            yield text
        if first != b'"':
            return
        try:
            text = json.loads(text).encode(errors="surrogatepass")
        except ValueError:
            return
