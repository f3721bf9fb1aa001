"""How much may be open at this API server at once; beyond it, clients are told to come again."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from aiohttp import web
from vllm.v1.engine import EngineCoreRequest

from llumnix.metrics import REFUSALS
from llumnix.server.body_checks.contents import asked
from llumnix.server.errors import RETRY_SOON, Handler, error_response
from llumnix.server.spans import until_over

BYTES_PER_TOKEN = 4  # of a body whose prompt has not been tokenised yet

# Routes behind which an engine or the tokenizer computes; all others always answer.
GENERATING = frozenset(
    {
        *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch"),
        *("/v1/responses", "/v1/messages", "/cohere/v2/chat", "/v1/systemone"),
        *("/v1/audio/transcriptions", "/v1/audio/translations"),
        *("/generate", "/inference/v1/generate", "/invocations", "/generative_scoring"),
        # These wait for the one tokenizer, as prompts do.
        *("/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/messages/render"),
        *("/v1/completions/render", "/v1/chat/completions/render", "/v1/responses/render"),
        *("/v1/completions/derender", "/v1/chat/completions/derender", "/cohere/v2/chat/render"),
        *("/v1/embeddings", "/v2/embed", "/pooling", "/classify"),
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    }
)


@dataclass(slots=True, eq=False)
class Slot:
    """What one HTTP request has open."""

    requests: int = 0
    tokens: int = 0  # of prompts
    # How many of the requests, and of the tokens, no engine has yet: those that the body asks for,
    # and one after the last.
    spare: int = 0
    guess: int = 0
    over: bool = False


class SharedCounts(Protocol):
    """What all API servers of a node have open, each of which tells the others."""

    def tell(self, requests: int, tokens: int) -> None:
        """This one has so many requests open, with prompts of so many tokens."""

    def others(self) -> tuple[int, int]:
        """Requests, and tokens of their prompts, that all others have open together."""

    def listens(self, well: bool) -> None:
        """Whether this one takes connections, and can serve them."""

    def is_ahead(self) -> bool:
        """Whether another one that takes connections has fewer requests open."""


# Set in the handler's task, and so in all tasks that vLLM makes of it.
_slot: ContextVar[Slot | None] = ContextVar("slot", default=None)


class Admission:
    """Counts open requests and the tokens of their prompts against two limits; 0 is no limit.

    An HTTP request is as many as its body asks for (prompts, times choices or beams), and, once
    they are tokenised, as engines have of it, with the tokens of each, but one at least. It is
    admitted whole, and gives everything back when its handler ends, however it ends, and its answer
    in the background, if it has one.
    """

    def __init__(
        self,
        max_requests: int,
        max_prompt_tokens: int,
        root_path: str = "",
        shared: SharedCounts | None = None,
    ) -> None:
        """`root_path` is what vLLM's application takes off the beginning of a path. `shared`: the
        counts of all API servers that the limits are for; None: of this one alone."""
        self._shared = shared
        self._max_requests = max_requests
        self._max_prompt_tokens = max_prompt_tokens
        self._root = root_path.rstrip("/")
        self._open: dict[str, tuple[Slot, int]] = {}  # by the id of an engine's request; its tokens
        self.requests = 0
        self.prompt_tokens = 0

    def guard(self, handler: Handler) -> Handler:
        """The handler, with 429 in its place for what is beyond the limits."""

        async def admit(request: web.Request) -> web.StreamResponse:
            if not self._limits(request):
                return await handler(request)
            size = len(await request.read())
            requests = asked.get()
            if (refusal := self._refuse(requests)) is not None:
                return refusal
            with self._taken(size // BYTES_PER_TOKEN, requests):
                return await handler(request)

        return admit

    def door(self, handler: Handler) -> Handler:
        """The handler, with 429 in its place while nothing is admitted: before bodies are read."""

        async def look(request: web.Request) -> web.StreamResponse:
            if self._limits(request) and (refusal := self._refuse(1)) is not None:
                return refusal
            return await handler(request)

        return look

    def enter(self, request: EngineCoreRequest) -> None:
        """Count a tokenised request of the handler that this is called from."""
        slot = _slot.get()
        if slot is None or slot.over:
            return
        tokens = len(request.prompt_token_ids or ())
        self._open[request.request_id] = slot, tokens
        self._add(slot, 0, tokens - slot.guess)
        slot.guess = 0
        if slot.spare:
            slot.spare -= 1
        else:
            self._add(slot, 1, 0)

    def leave(self, request_id: str) -> None:
        """A request that had been entered has ended; its handler may go on, with others."""
        slot, tokens = self._open.pop(request_id, (None, 0))
        if slot is None or slot.over:
            return
        if slot.requests > 1:
            self._add(slot, -1, -tokens)
        else:
            slot.spare, slot.guess = 1, tokens

    def _limits(self, request: web.Request) -> bool:
        path = request.path.removeprefix(self._root)
        return request.method == "POST" and path in GENERATING

    def _refuse(self, requests: int) -> web.Response | None:
        if 0 < self._max_requests < requests:
            sentence = (
                f"{requests} requests in one (prompts, times choices) are more than this server "
                f"has open at once, {self._max_requests}"
            )
            return error_response(400, sentence)
        others, tokens = self._shared.others() if self._shared else (0, 0)
        if 0 < self._max_requests < self.requests + others + requests:
            limit, text = "requests", f"{self._max_requests} requests"
        elif 0 < self._max_prompt_tokens <= self.prompt_tokens + tokens:
            limit, text = "prompt_tokens", f"prompts of {self._max_prompt_tokens} tokens"
        else:
            return None
        REFUSALS.labels(limit).inc()
        return error_response(429, f"{text} are open at this server; try again soon", RETRY_SOON)

    @contextlib.contextmanager
    def _taken(self, tokens: int, requests: int = 1) -> Iterator[None]:
        slot = Slot(spare=requests, guess=tokens)
        self._add(slot, requests, tokens)
        _slot.set(slot)
        try:
            with until_over(partial(self._give_back, slot)):
                yield
        finally:
            _slot.set(None)  # the next request of this connection has the same task

    def _give_back(self, slot: Slot) -> None:
        self._add(slot, -slot.requests, -slot.tokens)
        slot.over = True

    def _add(self, slot: Slot, requests: int, tokens: int) -> None:
        slot.requests += requests
        slot.tokens += tokens
        self.requests += requests
        self.prompt_tokens += tokens
        if self._shared is not None:
            self._shared.tell(self.requests, self.prompt_tokens)
