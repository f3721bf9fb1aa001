"""The door: who gets through to which route, and that nothing of a stranger's body is read."""

import asyncio
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given as drawn
from hypothesis import strategies as st

from llumnix.config import ConfigError
from llumnix.server.door import keyring
from llumnix.server.door.callers import is_local
from llumnix.server.door.keyring import KeyFile, digest
from llumnix.server.door.routes import ROUTES, Access, RouteTable
from tests.kit.door import Door, door, rules
from tests.kit.loop import on_loop

KEYS = {"api_key": ["k1", "k2"]}
OPERATORS = "/llumnix/drain", "/collective_rpc", "/reset_prefix_cache", "/metrics", "/docs"
CLIENTS = "/v1/models", "/invocations", "/tokenize", "/generate"
JSON = {"json": {"name": "a"}}


def paths(access: Access) -> list[str]:
    return [p.replace("{id}", "x").replace("{name}", "y").replace("*", "z") for p in ROUTES[access]]


# ---- keys and tokens ----


@on_loop
async def test_every_route_asks_for_the_key_that_it_should() -> None:
    async with door(given=KEYS, admin_token="boss") as node:
        for path in paths(Access.PUBLIC):
            assert await node.status(path) == 200, path
        for path, method in itertools.product(paths(Access.INFERENCE), ("GET", "POST")):
            got = [await node.status(path, key, method=method) for key in (None, "no", "k1", "k2")]
            assert got == [401, 401, 200, 200], path
            assert await node.status(path, "boss", method=method) == 200
        for path, method in itertools.product(paths(Access.OPERATOR), ("GET", "POST")):
            got = [await node.status(path, key, method=method) for key in (None, "no", "k1")]
            assert got == [401, 401, 403], path
            assert await node.status(path, "boss", method=method) == 200, path


@on_loop
async def test_nothing_of_a_body_is_read_before_its_caller_is_known() -> None:
    async with door(given=KEYS, admin_token="boss") as node:
        for path in (*CLIENTS, *OPERATORS, "/nowhere"):
            assert await node.status(path, method="POST", data=b"x" * 100) in (401, 404)
        assert await node.status("/llumnix/drain", "k1", method="POST", **JSON) == 403
        assert not node.read


@on_loop
async def test_routes_for_anybody_read_nothing_of_anybody() -> None:
    """Strangers filled the budget of bodies there, which is for clients."""
    async with door(given=KEYS, admin_token="boss") as node:
        for path in paths(Access.PUBLIC):
            for key in (None, "k1"):
                assert await node.status(path, key, method="POST", data=b"x" * 100) == 413
        assert not node.read


@on_loop
async def test_public_routes_with_a_slash_are_answered_briefly() -> None:
    """vLLM's redirect repeats the query: eight kilobytes, for anybody."""
    for config in ({"root_path": None}, {"root_path": "/base"}):
        async with door(given=KEYS | config, admin_token="boss") as node:
            for path in paths(Access.PUBLIC):
                path = (config["root_path"] or "") + path
                for slashes in ("/", "///"):
                    query = f"?{'a' * 8000}"
                    status, text = await node.ask(path + slashes + query, allow_redirects=False)
                    assert status == 307 and node.headers["Location"] == path
                    assert sum(map(len, node.headers.values())) + len(text) < 300
            assert not node.read


@on_loop
async def test_a_route_that_nobody_has_classified_is_closed() -> None:
    async with door(given=KEYS, admin_token="boss") as node:
        for path in ("/nowhere", "/v1/batches", "/llumnix", "//v1/models", "/metricsx", "/"):
            for key in (None, "k1"):
                status, text = await node.ask(path, key)
                assert status == 404 and '"Not Found"' in text, path
            assert await node.status(path, "boss") == 200


@drawn(st.text(alphabet="/abcdmprtuvilnx19%.;_- \n\0é", max_size=30))
def test_what_is_not_in_the_table_is_of_no_class(path: str) -> None:
    known = {p for access in ROUTES for p in paths(access)}
    if path.rstrip("/") not in known and not path.startswith(("/static/", "/v1/r", "/adapters/")):
        assert RouteTable().access(path) is None


@on_loop
async def test_tricks_with_a_path_open_nothing() -> None:
    tricks = ("/llumnix%2Fdrain", "/%6Clumnix/drain", "/llumnix/drain/", "/v1/../llumnix/drain")
    tricks += (
        "/LLUMNIX/drain",
        "/llumnix/drain;x",
        "/v1/models/../../sleep",
        "/sleep%00",
        "/sleep?",
    )
    async with door(given=KEYS, admin_token="boss") as node:
        for path in tricks:
            for key in (None, "k1"):
                assert await node.status(path, key) in (401, 403, 404), path
        assert not node.read


@on_loop
async def test_keys_are_shown_as_vllm_takes_them() -> None:
    async with door(given={"api_key": ["secret"]}) as node:
        for given, right in (
            ("Bearer secret", True),
            ("bearer secret", True),
            ("Bearer other", False),
            ("Basic secret", False),
            ("secret", False),
            ("", False),
            ("Bearer \udcff", False),
        ):
            status = await node.status("/v1/models", headers={"Authorization": given})
            assert status == (200 if right else 401), given


@on_loop
async def test_two_keys_at_once_are_none() -> None:
    async with door(given=KEYS) as node:
        headers = [("Authorization", "Bearer k1"), ("Authorization", "Bearer no")]
        async with node._client.get(
            f"http://127.0.0.1:{node.port}/v1/models", headers=headers
        ) as a:
            assert a.status == 401 and a.headers["WWW-Authenticate"] == "Bearer"


@on_loop
async def test_the_callers_name_goes_with_the_request(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who\nalice: secret-a\n\nbob secret-b\n")
    async with door(given=KEYS, api_key_file=str(file), admin_token="boss") as node:
        names = [(await node.ask("/v1/models", key))[1] for key in ("secret-a", "secret-b", "k2")]
        assert names == ["alice", "bob", "api-key-2"]
        assert (await node.ask("/v1/models", "boss"))[1] == "operator"
    async with door() as node:
        assert (await node.ask("/v1/models", "whatever"))[1] == "anyone"


@pytest.mark.parametrize("change", ["written", "replaced"])
@on_loop
async def test_keys_are_read_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(keyring, "LOOK_SECONDS", 0.0)
    file = tmp_path / "keys"
    file.write_text("alice:old\n")
    async with door(api_key_file=str(file)) as node:
        assert await node.status("/v1/models", "old") == 200
        new = file if change == "written" else tmp_path / "new"
        new.write_text("alice:newer\n")
        new.replace(file)
        assert await node.status("/v1/models", "newer") == 200
        assert await node.status("/v1/models", "old") == 401
        file.write_text("alice\n")  # by a bad hand
        assert await node.status("/v1/models", "newer") == 200
        file.unlink()
        assert await node.status("/v1/models", "newer") == 200
        file.write_text("")
        assert await node.status("/v1/models", "newer") == 401, "nobody's key is left"
        assert await node.status("/v1/models") == 401


BAD_FILES = {
    "alice\n": "line 1 is neither name:key nor name key",
    "a:k\nb c d\n": "line 2 is neither",
    "a:k\nb:k\n": "b and a have the same key",
    "a:boss\n": "the key in line 1 is the --admin-token as well",
    "a:k1\n": "the key in line 1 is one of --api-key as well",
    "a:k2\0x\n": "line 1 is neither",
    "a:k2\x7f\n": "line 1 is neither",
    "a:k2\x1cb:k3\n": "line 1 is neither",
    "\0\n": "line 1 is neither",
    "\xff": "can't be read: it is no text",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files_of_keys_are_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=BAD_FILES[text]) as refused:
        rules(KEYS, api_key_file=str(file), admin_token="boss")
    assert "k1" not in str(refused.value)


def test_a_pipe_is_no_file_of_keys(tmp_path: Path) -> None:
    """Whoever opened it would wait for somebody to write there."""
    pipe = tmp_path / "keys"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="is no file"):
        rules(KEYS, api_key_file=str(pipe))


@pytest.mark.parametrize(
    ("given", "config", "said"),
    [
        ({"api_key": [""]}, {}, "--api-key is empty: that would let everybody in"),
        ({"api_key": ["k", " "]}, {}, "--api-key is empty"),
        ({"api_key": ["k"]}, {"admin_token": "k"}, "--api-key and --admin-token must not be"),
        ({"api_key": ["k"]}, {"open_admin": True}, "--open-admin lets everybody be an operator"),
        ({}, {"open_admin": True, "admin_token": "k"}, "--open-admin lets everybody"),
        ({}, {"admin_address": "127.0.0.1:1"}, "--admin-address must have another port"),
        ({}, {"admin_address": "here"}, "--admin-address must be host:port"),
        ({}, {"api_key_file": "/no/where"}, "can't be read: No such file"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: Any, config: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rules(given, **config)


def test_an_empty_variable_for_the_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(ConfigError, match="VLLM_API_KEY is empty"):
        rules({})


# ---- operators without a token ----


PROXIES = ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "x-forwarded-host")
PROXIES += ("CF-Connecting-IP", "CF-Ray", "True-Client-IP", "X-Client-IP", "Fastly-Client-IP")
PROXIES += ("X-Cluster-Client-IP", "X-Original-Forwarded-For", "X-Original-URL", "CDN-Loop")
PROXIES += ("X-Envoy-External-Address", "X-Amzn-Trace-Id", "X-ARR-SSL", "Fly-Client-IP")
PROXIES += ("X-Azure-ClientIP", "WL-Proxy-Client-IP", "X-Remote-IP", "X-Remote-Addr")
PROXIES += ("X-ProxyUser-Ip", "Tailscale-User-Login", "Proxy-Connection", "CF-Connecting-IPv6")


@pytest.mark.parametrize("header", ["Accept", "X-Request-Id", "traceparent", "X-Client-Version"])
def test_headers_that_tell_of_no_proxy(header: str) -> None:
    class Transport(asyncio.Transport):
        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return {"peername": ("127.0.0.1", 5)}.get(name)

    given = {"headers": {header: "x"}, "transport": Transport()}
    assert is_local(make_mocked_request("GET", "/status", **given))


@on_loop
async def test_without_any_key_operators_call_from_the_machine_itself() -> None:
    async with door() as node:
        for path in OPERATORS:
            assert await node.status(path) == 200
            for header in PROXIES:
                status, text = await node.ask(path, headers={header: "127.0.0.1"})
                assert status == 403 and "on the node's own machine alone" in text
        assert await node.status("/v1/models", headers={"X-Forwarded-For": "1.2.3.4"}) == 200
    async with door(open_admin=True) as node:
        assert await node.status("/status", headers={"X-Forwarded-For": "1.2.3.4"}) == 200


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        (("127.0.0.1", 5), True),
        (("127.8.0.1", 5), True),
        (("::1", 5, 0, 0), True),
        (("::ffff:127.0.0.1", 5, 0, 0), True),
        (("::ffff:10.0.0.1", 5, 0, 0), False),
        (("fe80::1%eth0", 5, 0, 0), False),
        (("10.0.0.1", 5), False),
        (None, False),
    ],
)
def test_who_calls_from_this_machine(peer: Any, local: bool) -> None:
    class Transport(asyncio.Transport):
        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return {"peername": peer, "sockname": ("10.0.0.2", 8000)}.get(name)

    assert is_local(make_mocked_request("GET", "/status", transport=Transport())) is local


@on_loop
async def test_a_token_is_wanted_of_the_machine_itself_as_well() -> None:
    async with door(admin_token="boss") as node:  # and no client needs a key
        assert await node.status("/v1/models") == 200
        assert [await node.status("/status", key) for key in (None, "no", "boss")] == [
            401,
            401,
            200,
        ]
    assert rules(KEYS).needs_token and not rules({}).needs_token
    async with door("made", given=KEYS) as node:
        assert [await node.status("/status", key) for key in (None, "k1", "made")] == [
            401,
            403,
            200,
        ]


@pytest.mark.parametrize("token", ["", "boss"])
@on_loop
async def test_an_address_of_their_own(token: str) -> None:
    async with door(given=KEYS, admin_address="", admin_token=token) as node:
        there = node.admin_port
        for path in OPERATORS:
            status, text = await node.ask(path, token or "k1")
            assert status == 403 and "--admin-address only" in text
            assert await node.status(path, token or None, port=there) == 200
        got = [await node.status("/status", key, port=there) for key in (None, "k1")]
        assert got == ([401, 403] if token else [200, 200])
        assert await node.status("/v1/models", "k1") == 200
        assert await node.status("/v1/models") == 401
        assert await node.status("/nowhere", token or "k1") == 404
    assert not rules(KEYS, admin_address="127.0.0.1:2").needs_token


@on_loop
async def test_pages_have_no_inference_where_their_readers_need_no_key() -> None:
    """A page whose name resolves to the node's own address is the same site to a browser."""
    async with door(given=KEYS, admin_address="") as node:
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            for path in ("/v1/models", "/v1/completions"):
                assert await node.status(path, port=node.admin_port, headers=headers) == 403
                assert await node.status(path, "k1", port=node.admin_port, headers=headers) == 200
        assert await node.status("/v1/models", port=node.admin_port) == 200


def test_a_process_that_starts_has_the_keys_as_they_were(tmp_path: Path) -> None:
    """It read the file anew, and ended if that had gone wrong meanwhile."""
    file = tmp_path / "keys"
    file.write_text("alice:old\n")
    node = rules({}, keeps=True, api_key_file=str(file))
    file.write_text("alice:new\nbob:other\n")
    node.look()
    assert node.kept == "alice:new\nbob:other\n"
    for broken in ("no key here at all!", None):
        if broken is None:
            file.unlink()
        else:
            file.write_text(broken)
        node.look()
        with pytest.raises(ConfigError):
            rules({}, api_key_file=str(file))
        assert rules({}, node.kept, api_key_file=str(file)).kept == "", "one is enough"
        keys = KeyFile(str(file), "--api-key-file", kept=node.kept)
        names = [keys.name(digest(key)) for key in ("old", "new", "other")]
        assert names == [None, "alice", "bob"]
    file.write_text("carol:third\n")
    keys.look()
    assert keys.name(digest("third")) == "carol" and keys.name(digest("new")) is None


@on_loop
async def test_pages_that_an_option_makes_public() -> None:
    async with door(given=KEYS, admin_token="boss", public_metrics=True) as node:
        assert [await node.status(path) for path in ("/metrics", "/status")] == [200, 401]
    async with door(given=KEYS, admin_token="boss", public_status=True) as node:
        assert [await node.status(path) for path in ("/metrics", "/status")] == [401, 200]


# ---- pages of other sites ----


async def drain(node: Door, key: str | None = None, **headers: str) -> int:
    """What a page gets that posts JSON to the drain route."""
    kind = {"Content-Type": "application/json"}
    return await node.status(
        *("/llumnix/drain", key), method="POST", data=b'{"name": "a"}', headers=kind | headers
    )


@pytest.mark.parametrize("token", [None, "boss"])
@on_loop
async def test_operators_routes_want_json(token: str | None) -> None:
    async with door(admin_token=token or "") as node:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            assert await drain(node, token, **{"Content-Type": kind}) == 415
        assert not node.read
        assert (
            await drain(node, token, **{"Content-Type": "application/json; charset=utf-8"}) == 200
        )
        assert await node.status("/sleep", token, method="POST") == 200, "no body, no type"


@on_loop
async def test_operators_routes_refuse_pages_of_other_sites() -> None:
    named = {"allowed_origins": ["*", "http://dash"], "allow_credentials": False}
    async with door(given=named) as node:
        for origin in ("http://evil.example", "null", f"http://127.0.0.1:{node.port + 1}"):
            assert await drain(node, Origin=origin) == 403
            assert await node.status("/sleep", method="POST", headers={"Origin": origin}) == 403
        assert not node.read
        own = f"127.0.0.1:{node.port}"
        assert await drain(node, Origin=f"https://{own}") == 403, "another scheme, another site"
        assert await drain(node, Origin=own) == 403
        url = f"http://{own}/sleep"
        for second in ("http://evil.example", "http://dash", f"http://{own}"):
            both = [("Origin", "http://dash"), ("Origin", second)]
            async with node._client.post(url, headers=both) as answer:
                assert answer.status == 403
                assert "http" not in answer.headers.get("Access-Control-Allow-Origin", "")
        for origin in ("http://dash", f"http://{own}"):
            assert await drain(node, Origin=origin) == 200
        assert await node.status("/v1/models", headers={"Origin": "http://evil.example"}) == 200


@on_loop
async def test_a_name_of_another_site_that_leads_here_opens_nothing() -> None:
    """As after DNS rebinding: the page's own name, and so its own Origin, is this address."""
    async with door() as node:
        tricks = ("[::1].evil.example", "localhost:8772:evil", "localhost:evil", "x@localhost")
        tricks += ("127.0.0.1%.evil.example", "[::1", "::1]", "[localhost]", "[]", "localhost:1:1")
        tricks += ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[", "")
        for host in tricks:
            assert await node.status("/status", headers={"Host": host}) == 403, host
            origin = f"http://{host}"
            assert await drain(node, Host=host, Origin=origin) == 403
        for host in ("localhost:1", "127.0.0.1:1", "[::1]:1", "LOCALHOST", "10.1.2.3"):
            assert await node.status("/status", headers={"Host": host}) == 200, host
        assert await node.status("/v1/models", headers={"Host": "evil.example"}) == 200
    async with door(admin_token="boss") as node:
        assert await node.status("/status", "boss", headers={"Host": "api.example"}) == 200


@on_loop
async def test_a_browser_may_ask_what_it_may_send() -> None:
    named = KEYS | {"allowed_origins": ["*", "http://dash"]}
    asks = {"Access-Control-Request-Method": "POST", "Origin": "http://dash"}
    async with door(given=named, admin_token="boss") as node:

        async def preflight(path: str, **headers: str) -> int:
            return await node.status(path, method="OPTIONS", headers=asks | headers)

        assert await preflight("/llumnix/drain") == 204
        assert node.headers["Access-Control-Allow-Origin"] == "*"
        assert "Content-Type" in node.headers["Access-Control-Allow-Headers"]
        assert await preflight("/llumnix/drain", Origin="http://evil.example") == 403
        assert await preflight("/nowhere") == 404
        assert await preflight("/v1/completions", Origin="http://evil.example") == 200
        assert await node.status("/v1/completions", method="OPTIONS") == 401, "not a browser's"
        body = {"method": "OPTIONS", "headers": asks, "data": b"x"}
        assert await node.status("/v1/completions", **body) == 401, "they have no body"


# ---- where routes are ----


def test_the_path_that_an_application_takes_off() -> None:
    table = RouteTable("/api/")
    assert table.access("/api/sleep") is table.access("/sleep") is Access.OPERATOR
    assert table.access("/api/v1/models/") is Access.INFERENCE
    assert table.access("/apiv1/models") is table.access("/api") is None
    assert table.access("/api/api/sleep") is None
    assert table.places("/livez") == ("/livez", "/api/livez")
    assert RouteTable("").places("/livez") == RouteTable("/").places("/livez") == ("/livez",)


def test_a_path_is_of_one_class() -> None:
    every = [path for access in ROUTES for path in ROUTES[access]]
    assert len(every) == len(set(every))
    assert {*ROUTES} == {*Access}


@pytest.mark.parametrize(
    ("given", "config"),
    [({"api_key": ["one", "two"]}, {}), ({"api_key": ["one"]}, {"api_key_file": "keys"})],
)
def test_stored_responses_are_not_shared_by_clients(
    given: dict[str, Any], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config:
        (tmp_path / "keys").write_text("someone: two\n")
        config = {"api_key_file": str(tmp_path / "keys")}
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    with pytest.raises(ConfigError, match="keeps answers that every client could read"):
        rules(given, **config)
    rules({"api_key": ["one"]})
    rules({})
    monkeypatch.delenv("VLLM_ENABLE_RESPONSES_API_STORE")
    rules(given, **config)
