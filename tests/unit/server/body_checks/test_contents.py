"""What is refused before a parser sees it, and what a body counts for."""

import json
import time
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.engine.vllm.grammars.checks import asker
from llumnix.server.admission import Admission
from llumnix.server.body_checks import limits
from llumnix.server.body_checks.contents import Contents, check_keys, read
from llumnix.server.body_checks.fields import weigh
from llumnix.server.body_checks.forms import check_form
from llumnix.server.body_checks.json_scan import TooMuch, _depth, _outside, scan
from llumnix.server.body_checks.json_strings import check_strings
from llumnix.server.body_checks.limits import BodyLimits, body_limits
from llumnix.server.door.callers import ANYONE, CALLER, Caller
from llumnix.server.errors import BadContent, Handler
from llumnix.server.transport.bodies import Bodies
from tests.kit.loop import on_loop

MILLIONS = b'{"prompt":"x","a":[' + b",".join([b'{"a":{}}'] * 400_000) + b"]}"

TOO_MUCH = {
    "tiny objects": MILLIONS,
    "values": b'{"prompt":[' + b"1," * limits.VALUES + b"1,1]}",
    "keys": b"{" + b",".join(b'"%d":1' % n for n in range(limits.VALUES // 2 + 1)) + b"}",
    "strings": b'{"a":' + b'""' * 400_000 + b"}",
    "levels": b"[" * (limits.NESTING + 1) + b"]" * (limits.NESTING + 1),
    "levels that never end": b'{"a":' * 1000,
    "long numbers": b'{"prompt":[' + b",".join([b"1" * 4000] * 300) + b"]}",
    "hidden behind escapes": b'{"a":"\\\\\\\\","b":' + b"[" * 300 + b'"\\""' + b"]" * 300 + b"}",
    "UTF-16": json.dumps({"prompt": "\u2200", "a": [{}] * 100_000}).encode("utf-16-le"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_no_parser_sees(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(TooMuch):
        scan(TOO_MUCH[name])
    assert time.thread_time() - began < 0.5  # 10 ms, on a machine of one's own


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": "[{,:" * 500_000},
        {"prompt": 'say "[[[" \\ ' * 100_000},
        {"prompt": "\\" * 300_001 + '"' + "[" * 200},
        {"prompt": [12345] * 90_000},
        {"prompt": "x" * 3_000_000, "stop": ["\n"]},
        {"messages": [{"role": "user", "content": "x"}] * 2048},
    ],
)
def test_long_text_is_none_of_it(content: Any) -> None:
    scan(orjson.dumps(content))
    scan(json.dumps(content, indent=2).encode())
    assert weigh(content) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet='"\\[]{},:aé'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='"\\[{,:a'), inner),
    max_leaves=25,
)


def measured(value: Any) -> tuple[int, int, int]:
    """The objects and arrays, the keys, and the levels of a value."""
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inner = [measured(v) for v in (value.values() if isinstance(value, dict) else value)]
    keys = len(value) if isinstance(value, dict) else 0
    return (
        1 + sum(opened for opened, _, _ in inner),
        keys + sum(k for _, k, _ in inner),
        1 + max((depth for _, _, depth in inner), default=0),
    )


@settings(max_examples=200, deadline=None)
@given(JSON, st.booleans(), st.sampled_from([None, 1]))
def test_it_counts_what_a_parser_would(value: Any, ascii_only: bool, indent: int | None) -> None:
    outside = _outside(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode(), 10**6)
    opened, keys, depth = measured(value)
    assert outside.count(b"[") + outside.count(b"{") == opened
    assert outside.count(b":") == keys
    assert _depth(outside) == depth


@settings(max_examples=200, deadline=None)
@given(st.binary() | st.text(alphabet='"\\[]{},:1 \n').map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        scan(body)
    except TooMuch as error:
        assert "\n" not in str(error) and len(str(error)) < 200
    check = b"--" + body
    for form in (body, check, check * 70):
        try:
            check_form(form)
        except TooMuch as error:
            assert "form" in str(error)


def call(arguments: Any) -> dict[str, Any]:
    """A tool's call in a chat's history."""
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}


def result(content: Any, role: str = "tool") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


DEEP = "[" * 200_000
MANY = json.dumps({str(n): [] for n in range(40_000)})
FEW = json.dumps({str(n): n for n in range(4000)})


@pytest.mark.parametrize(
    "content",
    [
        call(DEEP),
        call(MANY),
        call(json.dumps(MANY)),
        call(json.dumps(json.dumps(DEEP))),
        call(f" \n{DEEP}"),
        call('{"a":' * 129 + "1" + "}" * 129),
        call("[" + ",".join(["1" * 4000] * 300) + "]"),
        {"messages": call(FEW)["messages"] * 16},
        {"input": [{"type": "function_call", "arguments": DEEP}]},
        {"input": [{"type": "function_call_output", "output": MANY}]},
        {"structured_outputs": {"json": DEEP}},
        {"sampling_params": {"structured_outputs": {"structural_tag": DEEP}}},
        {"chat_template_kwargs": {"tools": DEEP}},
        {"vllm_xargs": DEEP},
        result(MANY),
        result([{"type": "text", "text": DEEP}], "TOOL"),
        result([{"type": "tool_result", "content": [{"type": "text", "text": DEEP}]}], "user"),
    ],
)
def test_json_within_strings(content: Any) -> None:
    """It is measured as a body is; vLLM parses it on the loop."""
    body = json.dumps(content).encode()
    scan(body)
    began = time.thread_time()
    with pytest.raises(TooMuch, match="JSON within strings"):
        check_strings(content)
    assert time.thread_time() - began < 0.5
    with pytest.raises(TooMuch, match="JSON within strings"):
        Contents(BodyLimits())._read(body)


@pytest.mark.parametrize(
    "content",
    [
        call(FEW),
        call("not JSON " + DEEP),
        call(""),
        call({"a": "[" * 1000}),
        call('{"code": ' + json.dumps(DEEP) + "}"),
        call("\ud800"),
        call('"' + "x" * 100_000),
        {"messages": call(FEW)["messages"] * 5},
        result(DEEP, "user"),
        result("Found: " + DEEP),
        {"prompt": [1] * 100_000},
        {"prompt": DEEP, "structured_outputs": {"json": FEW}},
        {"arguments": None, "json": [1, "x", None]},
        [DEEP],
        DEEP,
        None,
    ],
)
def test_strings_that_are_no_json_or_little_of_it(content: Any) -> None:
    check_strings(content)


@settings(max_examples=200, deadline=None)
@given(JSON, st.integers(0, 3))
def test_any_string_is_looked_at(value: Any, layers: int) -> None:
    for _ in range(layers):
        value = json.dumps(value)
    check_strings(call(value))
    check_strings(result(value))


FIELDS = (
    *limits.LARGEST,
    *limits.ITEMS,
    *limits.STRING_BYTES,
    "prompt",
    "input",
    "items",
    "use_beam_search",
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from((*FIELDS, "sampling_params")), JSON, max_size=4))
def test_any_fields_weigh_something(content: dict[str, Any]) -> None:
    try:
        assert 1 <= weigh(content) <= limits.PROMPTS * max(limits.LARGEST.values())
    except BadContent as error:
        assert error.field in str(error)


@pytest.mark.parametrize(
    ("content", "requests"),
    [
        ({"prompt": "x"}, 1),
        ({"prompt": "x", "n": 4}, 4),
        ({"query": "x", "items": ["a", "b", "c"]}, 3),
        ({"text_1": "x", "text_2": ["a", "b"]}, 2),
        ({"prompt": "x", "n": "4"}, 4),
        ({"prompt": "x", "n": 4, "use_beam_search": True}, 4),
        ({"prompt": ["x", "y", "z"], "n": 2}, 6),
        ({"prompt": [1, 2, 3], "n": 2}, 2),
        ({"prompt_embeds": "AAAA", "n": 2}, 2),
        ({"prompt_embeds": ["AAAA"] * 3, "prompt": ["x", "y"]}, 5),
        ({"prompt": [[1, 2], [3]], "n": 2}, 4),
        ({"input": ["x", "y"]}, 2),
        ({"token_ids": [1], "sampling_params": {"n": 3}}, 3),
        ({"messages": [[{"role": "user"}], [{"role": "user"}]], "n": 2}, 4),
        ({"query": "x", "documents": ["y"] * 2048}, 2048),
        ({"query": "x", "documents": {"content": [{}] * 3}}, 3),
        ({"queries": ["x"] * 400, "documents": ["y"] * 400}, 400),
        ({"texts": ["x"] * 3}, 3),
        ({"messages": [{}], "documents": [{}] * 5}, 1),
        ({"state": "x", "questions": {"a": {}, "b": {}}, "images": ["x"]}, 2),
        ({"prompt": "x", "n": "0" * 5000 + "4"}, 4),
        ([], 1),
        (None, 1),
    ],
)
def test_what_a_body_counts_for(content: Any, requests: int) -> None:
    assert weigh(content) == requests


@pytest.mark.parametrize(
    "content",
    [
        {"n": 65},
        {"n": 1e300},
        {"n": "16384"},
        {"best_of": 16384},
        {"n": "0" * 30 + "16384"},
        {"allowed_token_ids": [1] * 16_385},
        {"sampling_params": {"extra_args": {"a": [1] * 16_385}}},
        {"vllm_xargs": {"a": [1] * 16_385}},
        {"vllm_xargs": {"a": "x" * 300_000}},
        {"query": "x", "items": ["a"], "label_token_ids": [1] * 1025},
        {"n": 33, "use_beam_search": True},
        {"sampling_params": {"n": 65}},
        {"prompt": ["x"] * 513},
        {"query": "x", "items": ["x"] * 513},
        {"prompt_embeds": ["AAAA"] * 513},
        {"sampling_params": {"trace_decode_token_ids": []}},
        {"stop": ["x"] * 65},
        {"stop": "x" * 20_000},
        {"logit_bias": {str(n): 1 for n in range(1025)}},
        {"bad_words": ["x"] * 257},
        {"structured_outputs": {"regex": "(a|b)*c" * 40_000}},
        {"sampling_params": {"structured_outputs": {"choice": ["x" * 1000] * 300}}},
        {"response_format": {"json_schema": {"schema": {str(n): [] for n in range(30_000)}}}},
        {"text": {"format": {"schema": {"const": "\ud800" * 300_000}}}},
        {"messages": [{}] * 2049},
        {"tools": [{}] * 513},
        {"messages": [{"role": "user", "content": [{}] * 257}]},
        {"messages": [{"role": "tool", "content": [{"content": ["x"] * 257}]}]},
        {"messages": [[{}] * 257]},
        {"messages": [{"role": "user", "content": [1, *[{}] * 256]}]},
    ],
)
def test_what_is_too_much_of_a_field(content: Any) -> None:
    with pytest.raises(BadContent) as caught:
        weigh(content)
    assert caught.value.field in str(caught.value)


def test_forms() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    check_form(part + b"x" * 10**6 + b"\r\n--b--\r\n")
    check_form(b"model=m&language=en")
    xargs = b'--b\r\nContent-Disposition: form-data; name="vllm_xargs"\r\n\r\n'
    check_form(xargs + b'{"a": 1}\r\n--b--\r\n')
    with pytest.raises(TooMuch, match="JSON within strings"):
        check_form(xargs + b"[" * 20_000 + b"\r\n--b--\r\n")
    with pytest.raises(TooMuch, match="written as they are"):
        check_form(b"--b\r\nContent-Disposition: form-data; name*=utf-8''n\r\n\r\n9\r\n--b--\r\n")
    for form in (part * 100, b"--b\r\nX: " + b"y" * 10**6, b"a=1&" * 100, b"a=" + b"x" * 10**6):
        with pytest.raises(TooMuch):
            check_form(form)


def test_limits_of_a_model() -> None:
    keys = b"{" + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}"
    with pytest.raises(TooMuch, match="more than 50000 objects, arrays and keys"):
        scan(keys, body_limits(0, 4096, False).values)
    scan(keys, body_limits(0, 100_000, False).values)
    small = BodyLimits(limits.TEXT_BODY_BYTES, limits.VALUES, 128 * 1024)
    assert body_limits(0, 4096, False) == small
    assert body_limits(0, 4096, True).body_bytes == limits.MEDIA_BODY_BYTES
    assert body_limits(0, 2**20, False) == BodyLimits(2**24, 2**21, 2**24 + 2**16)
    assert body_limits(7, 2**20, True).body_bytes == 7


@on_loop
async def test_refusals_over_http() -> None:
    admission, contents = Admission(8, 0), Contents(body_limits(0, 4096, False))
    seen: list[int] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(admission.requests)
        return web.Response()

    app = web.Application(client_max_size=contents.body_bytes)
    guarded = Bodies(5.0, 0).guard(contents.guard(admission.guard(answer)))
    app.router.add_post("/v1/completions", guarded)
    for path in ("/tokenize", "/v1/completions/render", "/generative_scoring"):
        app.router.add_post(path, guarded)
    async with TestClient(TestServer(app)) as client:

        async def post(
            body: bytes, path: str = "/v1/completions", kind: str = "application/json"
        ) -> tuple[int, Any]:
            headers = {"Content-Type": kind}
            async with client.post(path, data=body, headers=headers) as response:
                return response.status, await response.read()

        assert (await post(b'{"prompt": ["x", "y"], "n": 3}'))[0] == 200
        assert (await post(b'{"prompt": "x"}'))[0] == 200
        assert (await post(b"no json"))[0] == 200, "the application says it better"
        assert seen == [6, 1, 1] and admission.requests == 0
        status, body = await post(b'{"prompt": "x", "n": 9}')
        assert status == 400 and b"more than this server has open" in body
        status, body = await post(b'{"prompt": "x", "n": 16384}')
        assert status == 400 and orjson.loads(body)["error"]["param"] == "n"
        status, body = await post(MILLIONS)
        assert status == 400 and b"more than" in body
        status, body = await post(json.dumps(call(DEEP)).encode())
        assert status == 400 and b"JSON within strings" in body
        assert len(seen) == 3
        text = orjson.dumps({"prompt": "word " * 30_000})
        assert (await post(text))[0] == 200 and len(seen) == 4
        status, body = await post(text, "/tokenize")
        assert status == 400 and b"at most 131072 bytes" in body
        text = orjson.dumps({"prompt": "word " * 8_000, "return_token_strs": True})
        status, body = await post(text, "/tokenize")
        assert status == 400 and b"at most 32768 bytes" in body
        text = orjson.dumps({"prompt": "word " * 8_000})
        assert (await post(text, "/tokenize"))[0] == 200
        text = orjson.dumps({"prompt": "word " * 30_000, "truncate_prompt_tokens": 10})
        status, body = await post(text)
        assert status == 400 and b"at most 131072 bytes" in body
        assert (await post(text, "/v1/completions/render"))[0] == 400
        text = orjson.dumps({"query": "word " * 30_000, "items": ["x"]})
        status, body = await post(text, "/generative_scoring")
        assert status == 400 and b"query and items must have at most 131072 bytes" in body
        ids = orjson.dumps({"query": [12345] * 30_000, "items": ["x"]})
        assert (await post(ids, "/generative_scoring"))[0] == 200
        form = b"--b\r\nContent-Disposition: form-data; name=n\r\n\r\n0016384\r\n--b--\r\n"
        for said, kind in (
            (b"n=%2016384&model=x", "application/x-www-form-urlencoded"),
            (b'{"prompt":"x","n":16384}', "application/x-www-form-urlencoded"),
            (form, "multipart/form-data; boundary=b"),
            (b"\r\n" + form, "multipart/form-data; boundary=b"),
        ):
            status, body = await post(said, "/generative_scoring", kind)
            assert status == 400 and orjson.loads(body)["error"]["param"] == "n"
        admission.requests = 3
        assert (await post(b'{"prompt": "x", "n": 6}'))[0] == 429


MANY = {str(n): 1 for n in range(limits.KEYS + 1)}


@pytest.mark.parametrize(
    ("said", "within"),
    [
        (MANY, "the request"),
        ({"input": MANY}, "input"),
        ({"messages": [{"role": "user", "content": MANY}]}, "messages"),
        ({"vllm_xargs": MANY}, "vllm_xargs"),
    ],
)
def test_an_object_has_few_keys(said: Any, within: str) -> None:
    with pytest.raises(BadContent, match=f"an object in {within} must have at most 256 keys"):
        check_keys(said)


@pytest.mark.parametrize(
    "said",
    [
        {"tools": [{"function": {"parameters": {"properties": MANY}}}]},
        {"text": {"format": {"schema": {"properties": MANY}}}},
        {"logit_bias": MANY, "metadata": MANY, "chat_template_kwargs": {"a": MANY}},
        {"messages": [{"content": [{"type": "tool_use", "input": MANY}]}]},
    ],
)
def test_free_places_have_many_keys(said: Any) -> None:
    check_keys(said)


def test_what_a_tool_is_called_with_is_only_data() -> None:
    """On /v1/messages it is an object, in which a list may be long; the content's own may not."""
    long = {"names": ["x"] * (limits.INNER_ITEMS + 1)}
    part: dict[str, Any] = {"type": "tool_use", "id": "1", "name": "f", "input": long}
    for inside in (part, {"type": "function", "function": {"arguments": long}}):
        assert weigh({"messages": [{"role": "assistant", "content": [inside]}]}) == 1
        assert weigh({"input": [{"role": "assistant", "content": [inside]}]}) == 1
    for wrong in ([part] * 257, [{"type": "tool_result", "content": ["x"] * 257}]):
        with pytest.raises(BadContent, match="a list within messages must have at most 256 items"):
            weigh({"messages": [{"role": "assistant", "content": wrong}]})


@pytest.mark.parametrize("value", [[], 1, "x", float("inf"), True])
@pytest.mark.parametrize("inner", [None, "sampling_params", "parameters"])
def test_structured_outputs_are_an_object(value: Any, inner: str | None) -> None:
    said = {"prompt": "x", "structured_outputs": value}
    with pytest.raises(BadContent, match="structured_outputs must be an object"):
        weigh({inner: said} if inner else said)
    assert weigh({"prompt": "x", "structured_outputs": {"regex": "x"}}) == 1


@pytest.mark.parametrize("value", [{"a": 1}, -0.0, True, [1], [None]])
def test_stop_is_strings(value: Any) -> None:
    with pytest.raises(BadContent, match="stop must be a string or a list of strings"):
        weigh({"prompt": "x", "stop": value})
    for right in (None, "x", [], ["x"]):
        assert weigh({"prompt": "x", "stop": right}) == 1


@pytest.mark.parametrize("value", [1e308, -1e4, "1e308", float("nan"), 10**400])
def test_a_length_penalty_of_beams_is_bounded(value: Any) -> None:
    with pytest.raises(BadContent, match="length_penalty must be between -100 and 100"):
        weigh({"use_beam_search": True, "length_penalty": value})
    assert weigh({"use_beam_search": True, "length_penalty": -100}) == 1
    assert weigh({"length_penalty": value}) == 1


@pytest.mark.parametrize(
    "body",
    [
        rb'{"prompt":"\ud800"}',
        rb'{"prompt":"\uDBFFx\uDC00"}',
        rb'{"prompt":"\udc00\ud800"}',
        rb'{"prompt":"\\\ud800"}',
        rb'{"\ud800":1}',
        rb'{"prompt":"\ud83d\ude00\ude00"}',
    ],
)
def test_half_a_surrogate_is_no_text(body: bytes) -> None:
    with pytest.raises(TooMuch, match="half a surrogate pair"):
        read(body)
    with pytest.raises(TooMuch, match="half a surrogate pair"):
        check_strings({"arguments": body.decode()})


def test_what_looks_like_half_a_surrogate() -> None:
    body = rb'{"prompt":"\ud83d\ude00 \\ud800 \\\\ud800","a":NaN}'
    assert read(body)["prompt"] == "\U0001f600 \\ud800 \\\\ud800"
    assert read(b'{"prompt":"\xed\xa0\x80"}') is None  # one of three bytes


def test_a_model_has_a_short_name() -> None:
    with pytest.raises(BadContent, match="model must have at most 1024 characters"):
        weigh({"model": "x" * 1025})


@pytest.mark.parametrize("name", ["x" * 257, "a\nb", "\u00e9", "\x1b[2J"])
def test_a_request_has_a_short_plain_name(name: str) -> None:
    with pytest.raises(BadContent, match="request_id must have at most 256 printable ASCII"):
        weigh({"request_id": name})
    assert weigh({"request_id": "Root=1-67891233-abcdef012345678912345678; a/b"}) == 1


def _tool_said(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "tool", "tool_call_id": "a", "content": text}]}


@pytest.mark.parametrize("begins", ["[INFO] ", "[main 1234] ", "{ not JSON ", "[link](there) "])
def test_what_a_tool_says_may_begin_like_json(begins: str) -> None:
    """A log, a diff, Markdown: no parser goes further into it than to the first word."""
    check_strings(_tool_said(begins + "line after line of a log without any end. " * 3000))
    check_strings({"messages": _tool_said(begins + "x" * 1000)["messages"] * 60})


def test_prose_behind_json_hides_nothing() -> None:
    for text in ("[" * 100_000 + "x", "[" + "1," * 400_000 + "x"):
        with pytest.raises(TooMuch):
            check_strings(_tool_said(text))


def test_half_a_pair_that_is_only_written() -> None:
    """A tool has read source code, in which it stands."""
    check_strings(_tool_said('"use strict"; const half = /[\\ud800-\\udbff]/;'))
    check_strings(_tool_said("[\\ud800-\\udbff]"))
    with pytest.raises(TooMuch):
        check_strings(_tool_said('["\\ud800"]'))


@on_loop
async def test_who_asks_is_known_by_a_name_or_an_address() -> None:
    """By which the places of those whose grammars wait are shared."""
    seen: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(asker.get())
        return web.Response()

    @web.middleware
    async def let_in(request: web.Request, handler: Handler) -> web.StreamResponse:
        name = request.headers.get("Name")
        request[CALLER] = ANYONE if name is None else Caller(name)
        return await handler(request)

    app = web.Application(middlewares=[let_in])
    app.router.add_post("/", Contents(body_limits(0, 4096, False)).guard(answer))
    async with TestClient(TestServer(app)) as client:
        for headers in ({"Name": "alice"}, {}, {"Name": "bob"}):
            async with client.post("/", data=b"{}", headers=headers) as response:
                assert response.status == 200
    assert seen == ["alice", "127.0.0.1", "bob"]
