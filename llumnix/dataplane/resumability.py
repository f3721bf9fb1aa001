"""Which requests can't go on at another engine once they have begun to generate."""

from vllm.v1.engine import EngineCoreRequest

# For engines with a scheduler or a worker extension of the operator's own.
NO_RESUME = "its engine has no way to begin with outputs"


def why_pinned(request: EngineCoreRequest) -> str | None:
    """What keeps a request from going on elsewhere once it has outputs; None if nothing does."""
    if request.sampling_params is None:
        return "a pooling request has no tokens to go on from"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "its prompt has no token ids"
    if request.resumable:
        return "its input is still being streamed"
    return None
