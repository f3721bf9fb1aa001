"""A reasoning parser for a model that has no tokens for it: it thinks from ~ to ^, when asked to.

vLLM loads this file with --reasoning-parser-plugin.
"""

from typing import Any

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser
from vllm.reasoning.deepseek_v3_reasoning_parser import DeepSeekV3ReasoningParser

START, END = "~", "^"


class _Thinking(DeepSeekR1ReasoningParser):
    @property
    def start_token(self) -> str:
        return START

    @property
    def end_token(self) -> str:
        return END


@ReasoningParserManager.register_module("aloud")
class Aloud(DeepSeekV3ReasoningParser):
    """Thinks if the chat's template is told `thinking`, as its base class does."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        asked = kwargs.pop("chat_template_kwargs", None) or {}
        super().__init__(tokenizer, *args, **kwargs)
        if asked.get("thinking"):
            self._parser = _Thinking(tokenizer, *args, **kwargs)
