"""Who may call which route: the one table of every route that a node answers.

It has llumnix's own routes and all that vLLM 0.26 to 0.33 mounts in any of its modes. What is not
in it is closed to everybody but operators. `make docs` writes the table of docs/security.md out of
it.
"""

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum

from llumnix.dataplane.peer import PATH as PEER


class Access(StrEnum):
    """For whom a route is."""

    PUBLIC = "public"  # anybody
    INFERENCE = "inference"  # clients, and operators
    OPERATOR = "operator"
    PEER = "peer"  # nodes, which prove themselves on the channel


METRICS, STATUS = "/metrics", "/status"  # operators', unless an option makes them public

# `{name}` is one part of a path; a last `*` is whatever follows.
ROUTES: Mapping[Access, tuple[str, ...]] = {
    Access.PUBLIC: ("/livez", "/readyz", "/health", "/ping", "/version"),
    Access.INFERENCE: (
        *("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch"),
        *("/v1/responses", "/v1/responses/{id}", "/v1/responses/{id}/cancel"),
        *("/v1/messages", "/v1/messages/count_tokens", "/cohere/v2/chat", "/v1/systemone"),
        *("/generate", "/inference/v1/generate", "/invocations", "/generative_scoring"),
        *("/v1/completions/render", "/v1/completions/derender", "/v1/messages/render"),
        *("/v1/chat/completions/render", "/v1/chat/completions/derender"),
        *("/v1/responses/render", "/cohere/v2/chat/render", "/tokenize", "/detokenize"),
        *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"),
        *("/v1/embeddings", "/v2/embed", "/pooling", "/classify"),
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    ),
    Access.OPERATOR: (
        *(STATUS, METRICS, "/llumnix/requests", "/llumnix/migrate", "/llumnix/drain"),
        *("/load", "/kv_event_sources", "/server_info", "/tokenizer_info"),
        *("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/static/*"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/{name}"),
        *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
        *("/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory"),
        *("/pause", "/resume", "/is_paused", "/abort_requests", "/inference/v1/abort_requests"),
        *("/collective_rpc", "/start_profile", "/stop_profile", "/get_world_size"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/update_weights"),
        *("/start_weight_update", "/start_draft_weight_update", "/finish_weight_update"),
        *("/update_weight_version", "/weight_info", "/weight_checker"),
        *("/scale_elastic_ep", "/is_scaling_elastic_ep"),
        *("/fault_tolerance/apply", "/fault_tolerance/status"),
    ),
    Access.PEER: (PEER,),
}


class RouteTable:
    """The class of each path, as this node is configured."""

    def __init__(self, root_path: str = "", public: Iterable[str] = ()) -> None:
        """`root_path`: what may stand before every path; `public`: METRICS or STATUS, opened."""
        self._root = root_path.rstrip("/")
        self._exact: dict[str, Access] = {}
        self._shaped: list[tuple[re.Pattern[str], Access]] = []
        for access, paths in ROUTES.items():
            for path in paths:
                if "{" in path or path.endswith("*"):
                    self._shaped.append((_pattern(path), access))
                else:
                    self._exact[path] = access
        self._exact |= dict.fromkeys(public, Access.PUBLIC)

    def access(self, path: str) -> Access | None:
        """For whom a path is, decoded as its application will see it; None: nobody knows it."""
        path = self.stripped(path)
        path = path.rstrip("/") or path  # vLLM redirects these to the path without
        if (found := self._exact.get(path)) is not None:
            return found
        return next((a for pattern, a in self._shaped if pattern.fullmatch(path)), None)

    def stripped(self, path: str) -> str:
        """The path without --root-path, which clients may send or not."""
        return path[len(self._root) :] if self._root and path.startswith(self._root + "/") else path

    def places(self, path: str) -> tuple[str, ...]:
        """Where a route of llumnix's own is found: with --root-path before it, and without."""
        return tuple(dict.fromkeys((path, self._root + path)))


def _pattern(path: str) -> re.Pattern[str]:
    shape = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path.removesuffix("*")))
    return re.compile(shape + (".*" if path.endswith("*") else ""), re.DOTALL)
