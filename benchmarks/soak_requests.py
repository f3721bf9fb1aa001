"""Requests with all kinds of sampling parameters, whose outputs do not depend on chance."""

import random
from collections.abc import Callable
from typing import Any

WORDS = (
    *("river", "stone", "cloud", "lantern", "garden", "winter"),
    *("copper", "violin", "harbor", "meadow", "candle", "thunder"),
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}

Body = dict[str, Any]
Kind = Callable[[random.Random], Body]

KINDS: tuple[Kind, ...] = (
    lambda draw: {"temperature": 0},
    lambda draw: {"temperature": 0, "repetition_penalty": 1.2},
    lambda draw: {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.4},
    lambda draw: {"temperature": 0, "logprobs": 3},
    lambda draw: {"temperature": 0, "stop": [" and", "\n\n"]},
    lambda draw: {"temperature": 0, "min_tokens": draw.randrange(20, 90), "ignore_eos": False},
    lambda draw: {"temperature": 0, "bad_words": ["the", " a"]},
    lambda draw: {"temperature": 0, "logit_bias": {"260": -100, "284": 3}},
    lambda draw: {"temperature": 0, "echo": True},
    lambda draw: {"temperature": 0.8, "seed": draw.randrange(1000)},
    lambda draw: {"temperature": 1.0, "top_p": 0.9, "seed": draw.randrange(1000)},
    lambda draw: {"temperature": 1.1, "top_k": 20, "min_p": 0.02, "seed": draw.randrange(1000)},
    lambda draw: {"temperature": 0.9, "seed": draw.randrange(1000), "frequency_penalty": 0.4},
    lambda draw: {"temperature": 0.9, "seed": draw.randrange(1000), "n": 2},
    lambda draw: {"temperature": 0, "structured_outputs": {"json": SCHEMA}},
    lambda draw: {"temperature": 0.7, "seed": 5, "structured_outputs": {"regex": r"(\w+ ){30}end"}},
)


def requests_of(seed: int, number: int) -> list[tuple[str, Body]]:
    """So many requests, each kind in turn: the path, and the body."""
    draw = random.Random(seed)
    made = []
    for place in range(number):
        words = " ".join(draw.choice(WORDS) for _ in range(draw.choice((8, 30, 120, 300))))
        body: Body = {
            "model": "smol",
            "max_tokens": draw.randrange(40, 160),
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            **KINDS[place % len(KINDS)](draw),
        }
        if "structured_outputs" in body:
            body["ignore_eos"] = False
        if place % 3 == 2 and "echo" not in body and body.get("logprobs") is None:
            content = f"Tell a story with these words: {words}"
            made.append(
                (
                    "/v1/chat/completions",
                    body | {"messages": [{"role": "user", "content": content}]},
                )
            )
        else:
            made.append(("/v1/completions", body | {"prompt": f"A tale of {words}. Once"}))
    return made
