"""Fields of a request for a response that vLLM accepts, then keeps without bound or fails at."""

from typing import Any

from llumnix.server.body_checks import limits
from llumnix.server.errors import BadContent


def check_response_fields(path: str, said: Any) -> None:
    """Raise BadContent for what a request for a response may not have."""
    if not isinstance(said, dict):
        return
    if path.endswith("/responses"):
        _check_metadata(said.get("metadata"))
    if path.removesuffix("/render").endswith("/responses"):
        _check_answers(said.get("input"))


def _check_metadata(metadata: Any) -> None:
    """They are kept with the response, so there is as much as OpenAI takes."""
    if not isinstance(metadata, dict):
        return  # none, or what a model words better
    pairs, longest, most = limits.METADATA_PAIRS, limits.METADATA_KEY, limits.METADATA_VALUE
    texts = [value for value in metadata.values() if isinstance(value, str)]
    if len(metadata) > pairs:
        problem = f"at most {pairs} pairs"
    elif any(len(key) > longest for key in metadata):
        problem = f"keys of at most {longest} characters"
    elif any(len(text) > most for text in texts):
        problem = f"values of at most {most} characters"
    else:
        return
    raise BadContent(f"metadata must have {problem}", "metadata")


def _check_answers(items: Any) -> None:
    """An earlier answer must begin with a text: vLLM reads that, and fails at a refusal or none."""
    for item in items if isinstance(items, list) else ():
        if not isinstance(item, dict) or item.get("role") != "assistant":
            continue
        parts = item.get("content")
        if not isinstance(parts, list) or item.get("type") != "message":
            continue  # a text, or a message as in a chat
        first = parts[0] if parts else None
        if not parts or (isinstance(first, dict) and first.get("type") == "refusal"):
            raise BadContent(
                "an assistant's message in input must begin with an output_text", "input"
            )
