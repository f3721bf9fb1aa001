"""What `/v1/chat/completions/derender` may cost where outputs are parsed: bounded by CPU time.

Of a stream's next piece vLLM parses all pieces before it anew, and most of its parsers of tool
calls look at the whole text with each: hundreds of calls take some of them a second, and some a
minute. Meanwhile it has the thread that tokenises all prompts of the node.
"""

import functools
import time
from typing import Any

from llumnix.metrics import REFUSALS

SECONDS = 1.0  # of CPU: what a megabyte takes to be tokenised


class _TooSlow(Exception):
    """The parser of one request has had its time."""


def bound_derendering(state: Any) -> None:
    """Have the parser of vLLM's derenderer give up in time, and its client told why, with 400.

    vLLM has no limit, but the model's context. Versions that keep its parts elsewhere have none.
    """
    serving: Any = getattr(state, "serving_derender", None)
    derenderer: Any = getattr(serving, "online_derenderer", None)
    parser = getattr(derenderer, "parser", None)
    answer = getattr(serving, "derender_chat_stream_response", None)
    if parser is None or answer is None or not hasattr(parser, "parse_delta"):
        return
    slow: set[int] = set()  # requests, by their ids while they are answered

    class Bounded(parser):  # type: ignore[misc, valid-type]  # one is made for each request
        _until: float | None = None

        def parse_delta(self, text: str, token_ids: Any, request: Any, **options: Any) -> Any:
            now = time.thread_time()
            if self._until is None:
                self._until = now + SECONDS
            elif now > self._until:
                slow.add(id(request))
                raise _TooSlow
            return super().parse_delta(text, token_ids, request, **options)

    @functools.wraps(answer)
    async def bounded(request: Any) -> Any:
        try:
            answered = await answer(request)
            if id(request.chat_request) not in slow:
                return answered
        finally:
            slow.discard(id(request.chat_request))
        REFUSALS.labels("content").inc()
        return serving.create_error_response(
            f"the output takes longer than {SECONDS:g} s to parse piece by piece; derender larger "
            "pieces of it, or all of it at once, without stream"
        )

    functools.update_wrapper(Bounded, parser, updated=())
    derenderer.parser = Bounded
    serving.derender_chat_stream_response = bounded
