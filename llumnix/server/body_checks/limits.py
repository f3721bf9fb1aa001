"""What one request may hold at most, in one place: whatever is beyond is refused before it costs.

The numbers were chosen by measuring what a parser takes for them on one core of a small machine:
together they keep one body's parsing and validation below some 30 ms, in which no other stream of
the node gets a token.
"""

from dataclasses import dataclass

TEXT_BODY_BYTES = 4 * 2**20  # where prompts are text
MEDIA_BODY_BYTES = 26 * 2**20  # where they may hold images and sounds; vLLM takes 25 MB of these
BODY_BYTES_PER_TOKEN = 16  # of the context, if that is more: text, JSON's escapes, token ids
# vLLM bounds prompts that it will run, but none that it is only to tokenise, by the thread that
# tokenises all prompts of the node, about a megabyte in a second.
TOKENIZE_BYTES = 64 * 1024  # and BODY_BYTES_PER_TOKEN for each token of the context
TOKEN_STRINGS = 4  # times the cost where each token is to be told as text, on the loop

NESTING = 128  # levels of objects and arrays; vLLM takes 64 in a schema, which has others around it
VALUES = 100_000  # items of arrays and objects; or two for each token of the context
VALUES_PER_CONTAINER = 2  # of these: there may be half as many objects, arrays and keys together
VALUE_BYTES = 24  # of a value that is no string, on average: a number, a name
BINARY_VALUES = 10_000  # of MessagePack within strings, where a renderer's tensor is some ten
EMBEDS = 512  # tensors in a body
FORM_PARTS = 64  # of a multipart form
FORM_HEAD_BYTES = 16 * 1024  # of all that is no content in it

# A field of a body, and how much it may be, or how many items it may have.
LARGEST = {
    "n": 64,
    "best_of": 64,
}
BEAMS = 32  # n, where use_beam_search is set: each beam is a request in every step
ITEMS = {
    "messages": 2048,
    "tools": 512,
    "functions": 512,
    "documents": 2048,
    "queries": 2048,
    "texts": 2048,
    "inputs": 2048,
    "conversations": 128,
    "stop": 64,
    "stop_sequences": 64,
    "stop_token_ids": 1024,
    "logit_bias": 1024,
    "bad_words": 256,
    "logprob_token_ids": 1024,
    "label_token_ids": 1024,
    "allowed_token_ids": 16_384,
    "include": 64,
    "metadata": 1024,
    "media_io_kwargs": 1024,
    "vllm_xargs": 256,
    "images": 2048,
}
# What plug-ins of an operator's are told, which vLLM takes as it is: values and bytes.
EXTRAS = {
    "vllm_xargs": (16_384, 256 * 1024),
    "extra_args": (16_384, 256 * 1024),
}
# What a body has beside its prompts, times prompts times choices. A value costs the loop 0.4 us for
# each, and some of them more; a grammar's are passed on as they are, but for one copy.
COPIED_VALUES = 100_000
COPIED_BYTES = 8 * 2**20
VALUE_COSTS = {
    "bad_words": 8,  # each is tokenised twice
    "logit_bias": 4,
    "stop_token_ids": 4,
    "structured_outputs": 0.25,
    "response_format": 0.25,
    "text": 0.25,
}
KEYS = 256  # of an object, unless it is a place for what clients like:
FREE = frozenset(
    (
        *("schema", "json_schema", "json", "parameters", "input_schema", "structural_tag"),
        *("structured_outputs", "response_format", "logit_bias", "metadata", "arguments"),
        *("chat_template_kwargs", "reasoning_parser_kwargs", "media_io_kwargs"),
        *("mm_processor_kwargs", "kv_transfer_params", "ec_transfer_params"),
    )
)


def is_free(name: str, top: bool = False) -> bool:
    """Whether a field is for what clients like, such as what a tool is called with."""
    return name in FREE or (name == "input" and not top)


LENGTH_PENALTY = 100.0  # either way, where use_beam_search is set: a power of the length
INNER_ITEMS = 256  # of any list within one of the messages: parts of a content, calls of tools
PROMPTS = 512  # of one completion or embedding
METADATA_PAIRS, METADATA_KEY, METADATA_VALUE = 16, 64, 512  # of a response: what OpenAI takes
STRING_BYTES = {  # of the strings of these fields together
    "stop": 16 * 1024,
    "stop_sequences": 16 * 1024,
    "bad_words": 16 * 1024,
    "model": 1024,
    "cache_salt": 1024,
    "session_id": 1024,
    "user": 1024,
}
# Fields of a form that are looked at: those above, and what they depend on.
NAMES = frozenset((*LARGEST, *ITEMS, *STRING_BYTES, "use_beam_search", "length_penalty")) - {
    *EXTRAS
}


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """The limits that depend on the model which is served."""

    body_bytes: int = TEXT_BODY_BYTES
    values: int = VALUES
    tokenize_bytes: int = TEXT_BODY_BYTES  # of a text that is only to be tokenised


def body_limits(asked_bytes: int, context: int, media: bool) -> BodyLimits:
    """The limits for a model of so long a context, which takes images or sounds or does not.

    `asked_bytes` is what an operator wants as the largest body; 0: what the model makes sensible.
    """
    least = MEDIA_BODY_BYTES if media else TEXT_BODY_BYTES
    return BodyLimits(
        body_bytes=asked_bytes or max(least, BODY_BYTES_PER_TOKEN * context),
        values=max(VALUES, 2 * context),
        tokenize_bytes=TOKENIZE_BYTES + BODY_BYTES_PER_TOKEN * context,
    )
