"""Fields of a request for a response that nobody reads but its client, who may fetch them later."""

from typing import Any

from llumnix.server.body_checks import limits
from llumnix.server.errors import BadContent


def check_metadata(path: str, said: Any) -> None:
    """Raise BadContent for metadata that are beyond what OpenAI takes with a response."""
    if not path.endswith("/responses") or not isinstance(said, dict):
        return
    metadata = said.get("metadata")
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
