"""What the moved requests ask for, one case for each feature."""

import random
from typing import Any

from tests.kit.sampling import PERSON, SUMS, TAGS
from tests.kit.tails import story
from tests.kit.waves import Case

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_DRAW = random.Random(5)

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 72}
RANDOM: dict[str, Any] = GREEDY | {"temperature": 0.9, "seed": 11}
# Neither of them ends before a move has been made.
SOON: dict[str, Any] = GREEDY | {"min_tokens": 40, "max_tokens": 90}


def _completion(more: dict[str, Any], choices: int = 1, streams: bool = True) -> Case:
    prompt = story(_DRAW, _DRAW.randrange(2, 60))
    body = {"prompt": prompt, "return_token_ids": True}
    return Case(COMPLETIONS, body | more, choices, streams=streams)


def _chat(more: dict[str, Any], ask: str = "", choices: int = 1, shows: str = "") -> Case:
    words = story(_DRAW, _DRAW.randrange(2, 40))
    content = f"Tell me more: {words}{ask}"
    body = {"messages": [{"role": "user", "content": content}], "return_token_ids": True}
    return Case(CHAT, body | more, choices, shows)


def _tool(more: dict[str, Any]) -> Case:
    function = {"name": "look_up", "description": "Looks a person up", "parameters": PERSON}
    tools = [{"type": "function", "function": function}]
    base = {"temperature": 0.8, "seed": 2, "max_tokens": 120, "tools": tools}
    return _chat(base | more, shows="tool_calls")


CALL = (
    r'<tool_call>\n\{"name": "look_up", "arguments": '
    r'\{"name": "[A-Z][a-z]{12,20}", "born": 1[0-9]{3}\}\}\n</tool_call>'
)
THINK: dict[str, Any] = {"chat_template_kwargs": {"thinking": True}}

CASES: dict[str, Case] = {
    "temperature 0": _completion(GREEDY),
    "seed": _completion(RANDOM),
    "top_k, top_p and min_p": _completion(RANDOM | {"top_k": 30, "top_p": 0.9, "min_p": 0.01}),
    "penalties": _completion(
        GREEDY | {"presence_penalty": 0.6, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    ),
    "penalties and seed": _completion(RANDOM | {"frequency_penalty": 0.7}),
    "min_tokens": _completion(SOON | {"stop_token_ids": [28, 30]}),
    "stop": _completion(SOON | {"stop": [", ", "."]}),
    "include_stop_str_in_output": _completion(
        SOON | {"stop": [" the", "."], "include_stop_str_in_output": True}
    ),
    "bad_words": _completion(GREEDY | {"bad_words": [" the", " a", " and", " to be"]}),
    "logit_bias": _completion(GREEDY | {"logit_bias": {"260": -100, "284": 3}}),
    "allowed_token_ids": _completion(RANDOM | {"allowed_token_ids": list(range(250, 3000))}),
    "logprobs": _completion(GREEDY | {"logprobs": 4, "return_tokens_as_token_ids": True}),
    "prompt_logprobs": _completion(GREEDY | {"prompt_logprobs": 2}, streams=False),
    "echo": _completion(GREEDY | {"echo": True, "logprobs": 1}),
    "n": _completion(RANDOM | {"n": 3}, choices=3),
    "several prompts": _completion(
        RANDOM | {"prompt": [story(_DRAW, 9), story(_DRAW, 40)], "n": 2}, choices=4
    ),
    "skip_special_tokens": _completion(
        RANDOM
        | {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        | {"logit_bias": {"4": 12, "5": 12}}
    ),
    "repetition_detection": _completion(
        GREEDY
        | {"max_tokens": 90, "allowed_token_ids": [28, 260]}
        | {"repetition_detection": {"max_pattern_size": 3, "min_count": 25}}
    ),
    "stream_interval": _completion(GREEDY | {"stream_interval": 7}),
    "truncate_prompt_tokens": _completion(GREEDY | {"truncate_prompt_tokens": 20}),
    "extra_args": _completion(GREEDY | {"vllm_xargs": {"somebody": "else's"}}),
    "json": _completion(RANDOM | {"max_tokens": 90, "structured_outputs": {"json": PERSON}}),
    "regex": _completion(RANDOM | {"structured_outputs": {"regex": r"([A-Z][a-z]{2,8}, ){16}end"}}),
    "choice": _completion(
        GREEDY | {"structured_outputs": {"choice": [f"{story(_DRAW, 40)} {n}" for n in range(3)]}}
    ),
    "grammar": _completion(RANDOM | {"max_tokens": 90, "structured_outputs": {"grammar": SUMS}}),
    "json_object": _completion(
        RANDOM | {"response_format": {"type": "json_object"}, "max_tokens": 60}
    ),
    "structural_tag": _completion(RANDOM | {"response_format": TAGS, "max_tokens": 90}),
    "chat": _chat(GREEDY | {"logprobs": True, "top_logprobs": 2}),
    "chat n": _chat(RANDOM | {"n": 2}, choices=2),
    "chat schema": _chat(
        {"temperature": 0.7, "seed": 1, "max_tokens": 90}
        | {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": PERSON, "strict": True},
            }
        }
    ),
    "tool_choice": _tool({"tool_choice": "required"}),
    "tools": _tool({"structured_outputs": {"regex": CALL}, "temperature": 0}),
    "reasoning": _chat(RANDOM | THINK | {"logit_bias": {"78": 4}}, shows="reasoning"),
    "thinking_token_budget": _chat(
        RANDOM | THINK | {"thinking_token_budget": 30}, ask="\n~", shows="reasoning"
    ),
    "reasoning, then a schema": _chat(
        RANDOM
        | THINK
        | {"thinking_token_budget": 25, "max_tokens": 90, "structured_outputs": {"json": PERSON}},
        ask=" Think\n~",
        shows="reasoning",
    ),
}
