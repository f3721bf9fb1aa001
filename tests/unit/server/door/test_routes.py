"""The table of routes against the real ones, of llumnix and of vLLM's application."""

import ast
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
import vllm
from aiohttp import web
from starlette.routing import BaseRoute, Mount

from llumnix.dataplane.peer import PATH
from llumnix.engine.vllm import arguments as command_line
from llumnix.engine.vllm.compat import server_symbol
from llumnix.server.app import AppParts, make_app
from llumnix.server.door.cors import allow_origins
from llumnix.server.door.routes import ROUTES, Access, RouteTable
from llumnix.server.frontend import without_keys
from tests.kit.door import options, rules

FLAGS = (
    *("--enable-scale-out", "--enable-tokenizer-info-endpoint", "--enable-fault-tolerance"),
    *("--enable-offline-docs", "--enable-request-id-headers", "--tokens-only"),
    *("--enable-server-load-tracking", "--api-key", "secret"),
)
TASKS = (
    *("generate", "transcription", "realtime", "render"),
    *("embed", "classify", "token_embed", "token_classify"),
)
# Servers of vLLM's that are none of the API server's: llumnix never starts them.
OTHER_SERVERS = ("dp_supervisor.py", "preload.py")


def vllm_arguments(*flags: str) -> Namespace:
    """A parsed command line; flags that this version of vLLM does not have are left out."""
    parser = command_line.make_parser("test")
    known = [f for f in flags if not f.startswith("--") or f in parser._option_string_actions]
    return parser.parse_args(["--model", "m", *known])


def each(routes: list[BaseRoute]) -> Iterator[str]:
    for route in routes:
        path = str(getattr(route, "path", ""))
        yield path + "/x" if isinstance(route, Mount) and path == "/static" else path


@pytest.fixture(scope="module")
def vllm_paths() -> set[str]:
    """Every path of vLLM's application, with all tasks, in all modes that can be had together."""
    found: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            patch.setenv(name, "1")
        patch.setenv("SAGEMAKER_ENABLE_LORA", "1")
        model = MagicMock()
        model.get_pooling_task.return_value = "embed"
        for flags in (FLAGS, FLAGS[:2], ()):
            arguments = without_keys(vllm_arguments(*flags))
            app = server_symbol("build_app")(arguments, TASKS, model)
            found |= set(each(app.router.routes))
    return found


def test_every_route_of_vllm_is_classified(vllm_paths: set[str]) -> None:
    assert {"/collective_rpc", "/sleep", "/v1/embeddings", "/v1/load_lora_adapter"} <= vllm_paths
    assert {"/v1/audio/transcriptions", "/v1/realtime", "/invocations", "/docs"} <= vllm_paths
    assert len(vllm_paths) > 60
    unknown = sorted(path for path in vllm_paths if RouteTable().access(path) is None)
    assert not unknown, f"these are in no class of routes.py, and closed: {unknown}"


def test_every_route_in_vllms_source_is_classified() -> None:
    """Those, too, that a mode mounts in which the test above has not built the application."""
    found = {}
    for package in ("vllm/entrypoints", "model_hosting_container_standards"):
        for file in Path(vllm.__file__).parents[1].joinpath(package).rglob("*.py"):
            if file.name not in OTHER_SERVERS:
                found |= dict.fromkeys(in_source(file), file)
    assert len(found) > 60 and "/v1/audio/translations" in found
    unknown = {path: file for path, file in found.items() if RouteTable().access(path) is None}
    assert not unknown


MOUNTS = {"get", "post", "put", "delete", "patch", "websocket", "api_route", "add_api_route"}


def in_source(file: Path) -> Iterator[str]:
    """The paths that this file gives to a router."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        first = node.args[0] if node.args else None
        named = [k.value for k in node.keywords if k.arg == "path"]
        for value in [first] if name in MOUNTS else named:
            if isinstance(value, ast.Constant) and str(value.value).startswith("/"):
                yield str(value.value)


def test_vllm_guards_nothing_itself(vllm_paths: set[str]) -> None:
    """Its middleware knows --api-key alone; the door in front knows all keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "secret")
        arguments = without_keys(vllm_arguments("--api-key", "secret"))
        app = server_symbol("build_app")(arguments, TASKS[:1], MagicMock())
    assert not [m for m in app.user_middleware if "Authentication" in str(m.cls)]


def own_app(root_path: str = "", **config: Any) -> web.Application:
    """llumnix's application, whose routes nobody calls here."""
    door = rules({"root_path": root_path}, **config).guard()
    around = {"guard.return_value": AsyncMock(), "door.return_value": AsyncMock(), "body_bytes": 1}
    parts = AppParts(
        gateway=AsyncMock(),
        admin=AsyncMock(),
        moves=AsyncMock(),
        drains=AsyncMock(),
        admission=MagicMock(**around),
        contents=MagicMock(**around),
        priorities=MagicMock(**around),
        generate=AsyncMock(),
        peer=(PATH, AsyncMock()),
        origins=allow_origins(options()),
        bodies=MagicMock(**around),
        door=door,
    )
    return make_app(parts)


@pytest.mark.parametrize("root", ["", "/api"])
def test_every_route_of_llumnix_is_classified(root: str) -> None:
    table = RouteTable(root)
    routes = [r.resource.canonical for r in own_app(root).router.routes() if r.resource is not None]
    own = set(routes) - {"/{path}"}
    assert len(own) == 10 * (2 if root else 1)
    for path in own:
        assert table.access(path) is not None, path
        assert (path.removeprefix("/api") in own) and (root + path.removeprefix("/api") in own)
    assert {p for p in own if table.access(p) is Access.PEER} == {root + PATH, PATH}


def test_only_probes_and_the_version_are_public() -> None:
    assert set(ROUTES[Access.PUBLIC]) == {"/livez", "/readyz", "/health", "/ping", "/version"}
