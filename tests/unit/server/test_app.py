"""When clients' requests are taken, and when they are told to come again."""

import json
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from vllm.exceptions import VLLMValidationError

from llumnix.server.app import Gateway
from llumnix.server.body_checks.contents import Contents, content
from llumnix.server.body_checks.limits import BodyLimits
from llumnix.server.door.routes import RouteTable
from llumnix.server.engine_requests import Opened
from llumnix.server.errors import openai_errors
from llumnix.server.status_routes import Standing
from llumnix.server.transport.bodies import Bodies
from tests.kit.loop import on_loop


class Served(Gateway):
    """Whose frontend answers everything."""

    async def _answer(self, *request: Any) -> web.StreamResponse:
        return web.Response(text="served")


class Post:
    """As much of a request as is looked at before vLLM sees it."""

    method, content_type, protocol = "POST", "application/json", None

    def __init__(self, path: str = "/v1/completions", body: bytes = b"{}") -> None:
        self.path = path
        self._body = body

    async def read(self) -> bytes:
        return self._body


def made(frontend: bool, standing: Standing) -> Served:
    """A gateway of which the frontend, once there, knows the routes of completions alone."""
    opened: Any = SimpleNamespace(has=lambda path: path == "/v1/completions") if frontend else None
    return Served(lambda: opened, standing, RouteTable())


@pytest.mark.parametrize(
    ("frontend", "standing", "status"),
    [
        (True, Standing(True, ""), 200),
        (True, Standing(False, "no instance is ready"), 503),
        (True, Standing(False, "no instance is ready", awaiting=True), 200),
        (False, Standing(False, "the node is starting", awaiting=True), 503),
    ],
    ids=["ready", "none starts", "one starts", "never served"],
)
def test_requests_wait_while_an_instance_starts(
    frontend: bool, standing: Standing, status: int
) -> None:
    gateway = made(frontend, standing)

    @on_loop
    async def check() -> None:
        answer = await gateway.handle(Post())  # type: ignore[arg-type]
        assert answer.status == status
        assert ("Retry-After" in answer.headers) is (status == 503)

    check()


@on_loop
async def test_what_has_been_read_is_looked_at() -> None:
    """By all that look at a body, in the order in which the application has them."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    app = web.Application()
    guarded = Bodies(5.0, 0).guard(Contents(BodyLimits()).guard(answer))
    app.router.add_post("/", guarded)
    async with TestClient(TestServer(app)) as client:
        for body, status in ((b'{"n": 2}', 200), (b'{"n": 99999}', 400), (b"[" * 999, 400)):
            async with client.post("/", data=body) as got:
                assert got.status == status, await got.text()


@pytest.mark.parametrize(
    ("frontend", "path", "status"),
    [
        (False, "/v1/completions", 503),
        (False, "/v1/embeddings", 503),  # it may turn out to be there
        (False, "/v1/batches", 404),
        (True, "/v1/embeddings", 404),
        (True, "/v1/completions", 503),
    ],
)
def test_routes_are_judged_before_instances(frontend: bool, path: str, status: int) -> None:
    gateway = made(frontend, Standing(False, "no instance is ready"))

    @on_loop
    async def check() -> None:
        assert (await gateway.handle(Post(path))).status == status  # type: ignore[arg-type]

    check()


@pytest.mark.parametrize(("method", "status"), [("GET", 404), ("POST", 400)])
@on_loop
async def test_a_stream_that_cannot_begin_is_an_error_and_no_bug(method: str, status: int) -> None:
    """A response of which vLLM keeps no events: it finds that out when the answer has a status."""
    application = FastAPI()

    async def events() -> AsyncGenerator[str, None]:
        raise VLLMValidationError("Unknown response_id: resp_1")
        yield ""

    @application.api_route("/v1/responses/{one}", methods=["GET", "POST"])
    async def stored(one: str) -> StreamingResponse:
        return StreamingResponse(events())

    @application.exception_handler(VLLMValidationError)
    async def word(request: Request, error: VLLMValidationError) -> Response:
        return Response(status_code=400)

    nothing: dict[str, Any] = {"shapes": None, "streams": None, "stop": None, "end": None}
    frontend: Any = SimpleNamespace(app=application, **nothing)
    gateway = Gateway(lambda: frontend, Standing(True, ""), RouteTable())
    app = web.Application(middlewares=[openai_errors])
    app.router.add_route("*", "/{path:.*}", gateway.handle)
    async with TestClient(TestServer(app)) as client:
        path = "/v1/responses/resp_1?stream=true"
        async with client.request(method, path, data=b"") as got:
            said = (await got.json())["error"]["message"]
            assert got.status == status and said.startswith("Unknown response_id"), said


class Noting(Served):
    """Which notes whether an answer is to go on without its client."""

    goes_on = False

    def answering(
        self, request: web.Request, goes_on: bool = False
    ) -> AbstractContextManager[Opened]:
        self.goes_on = goes_on
        return super().answering(request, goes_on)


@pytest.mark.parametrize(
    ("path", "said", "goes_on"),
    [
        ("/v1/responses", {"background": True}, True),
        ("/v1/responses", {"background": False}, False),
        ("/v1/responses", {"metadata": {"background": "sea"}}, False),
        ("/v1/responses", None, False),
        ("/v1/completions", {"background": True}, False),
    ],
)
@on_loop
async def test_only_an_answer_in_the_background_goes_on_without_its_client(
    path: str, said: Any, goes_on: bool
) -> None:
    frontend: Any = SimpleNamespace()
    gateway = Noting(lambda: frontend, Standing(True, ""), RouteTable())
    content.set(said)
    request: Any = Post(path, json.dumps(said).encode())
    await gateway.handle(request)
    assert gateway.goes_on == goes_on
