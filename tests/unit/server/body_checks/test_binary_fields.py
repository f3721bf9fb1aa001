"""Binary data within the texts of a body: what is made of it is bounded before it is made."""

import time
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import (
    decode_mm_kwargs_item,
    encode_mm_kwargs_item,
)
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalSharedField,
)

from llumnix.engine.vllm.frontend.media_budgets import media_budget
from llumnix.metrics import REFUSALS
from llumnix.server.body_checks import limits
from llumnix.server.body_checks.base64_text import Base64Text
from llumnix.server.body_checks.binary_fields import NOTHING, Taken, check_binary_fields
from llumnix.server.body_checks.contents import Contents
from llumnix.server.body_checks.json_scan import TooMuch
from llumnix.server.body_checks.limits import BodyLimits
from llumnix.server.body_checks.media_items import NoItem, check_item
from llumnix.server.body_checks.msgpack_scan import MsgpackScan
from llumnix.server.errors import BadContent
from llumnix.server.transport.bodies import Bodies
from tests.kit.loop import on_loop
from tests.kit.tensors import npy, saved, text

ALL = Taken(prompt_embeds=True, media_embeds=True, media_items=True)
PLAIN = text(saved(torch.zeros(2, 3)))
WIDE = text(saved(torch.zeros(1).expand(1_000_000, 576)))
RAW = msgspec.msgpack.Ext(3, b"\0" * 24)


def element(**changed: Any) -> dict[str, Any]:
    return {
        "data": ["float32", [2, 3], RAW],
        "field": ["batched", {"keep_on_cpu": False}],
    } | changed


def packed(said: Any) -> str:
    return text(msgspec.msgpack.encode(said))


def item() -> MultiModalKwargsItem:
    def made(data: Any, field: Any) -> MultiModalFieldElem:
        return MultiModalFieldElem(data=data, field=field)

    nested = [torch.zeros(2, dtype=torch.bfloat16), [torch.zeros(0, 5), torch.tensor(3)], 0.5]
    slices = [[slice(0, 3, None)], [slice(3, 4, 1), slice(None)]]
    return MultiModalKwargsItem(
        {
            "pixel_values": made(torch.zeros(300, 200), MultiModalBatchedField()),
            "grid": made(nested, MultiModalFlatField(slices=slices, dim=1, keep_on_cpu=True)),
            "cached": made(None, MultiModalSharedField(batch_size=3)),
        }
    )


def test_what_a_renderer_makes_passes() -> None:
    sent = encode_mm_kwargs_item(item())
    check_item(sent, MsgpackScan())
    assert decode_mm_kwargs_item(sent).keys() == item().keys()


NO_ITEMS = {
    "no map": text(b"hello"),
    "no MessagePack": text(b"\xc1"),
    "more behind it": text(b"\x80\x80"),
    "half of it": text(msgspec.msgpack.encode({"k": element()})[:-3]),
    "keys that are numbers": packed({1: element()}),
    "no element": packed({"k": 1}),
    "no field": packed({"k": {"data": None}}),
    "too many keys": packed({"k": element(more=1)}),
    "an unknown field": packed({"k": element(field=["__init__", {}])}),
    "an unknown option": packed({"k": element(field=["batched", {"x": 1}])}),
    "a missing option": packed({"k": element(field=["flat", {}])}),
    "an option of another kind": packed({"k": element(field=["shared", {"batch_size": "x"}])}),
    "slices of four": packed({"k": element(field=["flat", {"slices": [[1, 2, 3, 4]]}])}),
    "a string as data": packed({"k": element(data="x")}),
    "an unknown type": packed({"k": element(data=["load", [2, 3], RAW])}),
    "fewer bytes than it says": packed({"k": element(data=["float32", [2, 4], RAW])}),
    "a negative shape": packed({"k": element(data=["float32", [-2, -3], RAW])}),
    "bytes of nowhere": packed({"k": element(data=["float32", [2, 3], 0])}),
    "a pickle": packed({"k": element(data=msgspec.msgpack.Ext(1, b"\x80\x02N."))}),
    "signs that are skipped": PLAIN[:8] + "!!!!" + PLAIN[8:],
}


@pytest.mark.parametrize("name", NO_ITEMS)
def test_what_is_no_item(name: str) -> None:
    with pytest.raises(NoItem):
        check_item(NO_ITEMS[name], MsgpackScan())


def bomb(count: int, one: bytes = b"\x90") -> str:
    """So many values of a byte each, where a tensor is due."""
    head = msgspec.msgpack.encode({"k": element(data=None)})
    data = b"\xdd" + count.to_bytes(4, "big") + one * count
    return text(head.replace(b"\xa4data\xc0", b"\xa4data" + data))


@pytest.mark.parametrize("one", [b"\x90", b"\x01", b"\x80", b"\xa0"])
def test_values_are_counted(one: bytes) -> None:
    check_item(bomb(100, b"\x90"), MsgpackScan())
    sent, scan = bomb(2_000_000, one), MsgpackScan()
    began = time.thread_time()
    with pytest.raises(TooMuch, match="more than 10000 values"):
        check_item(sent, scan)
    assert time.thread_time() - began < 0.5  # 15 ms, on a machine of one's own


def test_values_of_all_items_are_counted_together() -> None:
    scan = MsgpackScan()
    for _ in range(9):
        check_item(bomb(1000), scan)
    with pytest.raises(TooMuch):
        check_item(bomb(1000), scan)


def test_levels_are_counted() -> None:
    with pytest.raises(TooMuch, match="more than 128 levels"):
        MsgpackScan().read(b"\x91" * 5000 + b"\xc0")
    with pytest.raises(TooMuch, match="values"):
        MsgpackScan().read(b"\xdf\xff\xff\xff\xff" + b"\xa0\x01" * 20_000)


SAID = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=30,
)


@settings(max_examples=60, deadline=None)
@given(SAID)
def test_what_is_read_is_what_was_written(said: Any) -> None:
    data = msgspec.msgpack.encode(said)
    assert repr(MsgpackScan().read(data)) == repr(msgspec.msgpack.decode(data))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_as_by_the_decoder(data: bytes) -> None:
    try:
        MsgpackScan().read(data)
    except (ValueError, TooMuch):
        return
    msgspec.msgpack.decode(data, ext_hook=lambda code, content: bytes(content))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100), st.integers(0, 110), st.integers(0, 110))
def test_any_bytes_of_a_text(data: bytes, start: int, count: int) -> None:
    sent = Base64Text(text(data))
    assert sent.size == len(data) and sent.whole() == data
    assert sent.read(start, count) == data[start : start + count]


NO_ARRAYS = {
    "objects": b"\x93NUMPY\1\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (3,), }".ljust(
        128
    ),
    "strings": npy(np.array(["abc"])),
    "more than it has": npy(np.zeros((2, 3), np.float32)).replace(b"(2, 3)", b"(9999999999, 3)"),
    "another version": b"\x93NUMPY\7\0" + b"x" * 200,
    "no head": b"\x93NUMPY",
}


@pytest.mark.parametrize("name", NO_ARRAYS)
@on_loop
async def test_what_is_no_array(name: str) -> None:
    said = {"messages": [{"content": [{"type": "image_embeds", "image_embeds": None}]}]}
    part = said["messages"][0]["content"][0]
    part["image_embeds"] = text(npy(np.zeros((2, 3), np.float32)))
    await check_binary_fields(said, ALL)
    part["image_embeds"] = text(NO_ARRAYS[name])
    with pytest.raises(BadContent, match="image_embeds must be base64 of"):
        await check_binary_fields(said, ALL)


def _part(**part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]}


def _places(sent: str) -> dict[str, dict[str, Any]]:
    return {
        "a completion": {"prompt_embeds": sent},
        "several of it": {"prompt_embeds": [PLAIN, sent]},
        "a part of a message": _part(type="prompt_embeds", data=sent),
        "a part without a type": _part(prompt_embeds=None, data=sent, uuid="a"),
        "an image": _part(type="image_embeds", image_embeds=sent),
        "several of an image": _part(type="image_embeds", image_embeds={"a": PLAIN, "b": sent}),
        "an image without a type": _part(image_embeds=sent, uuid="a"),
        "a sound": _part(type="audio_embeds", audio_embeds=sent),
        "a video": _part(type="video_embeds", video_embeds=sent),
        "several talks": {"messages": [_part(type="audio_embeds", audio_embeds=sent)["messages"]]},
        "a response": {"input": _part(type="video_embeds", video_embeds=sent)["messages"]},
        "a scoring": {"data_2": {"content": [{"type": "image_embeds", "image_embeds": sent}]}},
    }


@pytest.mark.parametrize("place", _places(""))
@on_loop
async def test_tensors_are_found_wherever_they_are_taken(place: str) -> None:
    await check_binary_fields(_places(PLAIN)[place], ALL)
    with pytest.raises(BadContent, match="but holds 4"):
        await check_binary_fields(_places(WIDE)[place], ALL)
    with pytest.raises(BadContent, match="has no --enable-"):
        await check_binary_fields(_places(PLAIN)[place], NOTHING)
    with pytest.raises(BadContent):
        await check_binary_fields(_places("no base64")[place], ALL)


@pytest.mark.parametrize(
    "said",
    [
        {"tools": [{"function": {"parameters": {"properties": {"prompt_embeds": {"type": "x"}}}}}]},
        {
            "response_format": {
                "json_schema": {"schema": {"properties": {"image_embeds": {"a": "b"}}}}
            }
        },
        {"messages": [{"content": [{"type": "tool_use", "input": {"prompt_embeds": "x"}}]}]},
        {"messages": [{"tool_calls": [{"function": {"arguments": {"image_embeds": "x"}}}]}]},
        {"prompt": "prompt_embeds", "prompt_embeds": None, "metadata": {"image_embeds": "x"}},
        {"features": {"mm_hashes": {"image": ["a"]}, "kwargs_data": {"image": [None]}}},
        ["x"],
    ],
)
@on_loop
async def test_what_only_has_the_name_of_a_tensor(said: Any) -> None:
    await check_binary_fields(said, NOTHING)


@on_loop
async def test_tensors_of_a_body_are_few() -> None:
    said = {"messages": [_part(type="prompt_embeds", data=PLAIN)] * (limits.EMBEDS + 1)}
    with pytest.raises(BadContent, match="at most 512 tensors"):
        await check_binary_fields(said, ALL)


@on_loop
async def test_refusals_over_http() -> None:
    seen: list[Any] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        assert (media_budget.get() is not None) == (request.path == "/all")
        seen.append(orjson.loads(await request.read()))
        return web.Response()

    app = web.Application(client_max_size=10**8)
    for path, taken in (("/all", ALL), ("/nothing", NOTHING)):
        guarded = Contents(BodyLimits(), taken).guard(answer)
        app.router.add_post(path, Bodies(5.0, 0).guard(guarded))
    features = {"mm_hashes": {"image": ["a"]}}
    async with TestClient(TestServer(app)) as client:

        async def post(path: str, said: Any) -> tuple[int, Any]:
            async with client.post(path, json=said) as response:
                body = await response.read()
                return response.status, orjson.loads(body)["error"] if body else None

        right = {
            "features": {**features, "kwargs_data": {"image": [encode_mm_kwargs_item(item())]}}
        }
        assert (await post("/nothing", {"prompt": "x"}))[0] == 200
        assert (await post("/all", {"prompt_embeds": PLAIN}))[0] == 200
        assert (await post("/all", right))[0] == 200 and len(seen) == 3
        before = REFUSALS.labels("content")._value.get()
        for path, said, name, words in (
            ("/all", {"prompt_embeds": WIDE}, "prompt_embeds", "would have 2304000000 bytes"),
            (
                "/nothing",
                {"prompt_embeds": PLAIN},
                "prompt_embeds",
                "has no --enable-prompt-embeds",
            ),
            ("/nothing", right, "kwargs_data", "is for models that take images"),
            (
                "/all",
                {"features": {**features, "mm_metadata": {"image": [None, text(b"hello")]}}},
                "mm_metadata",
                "must be what a renderer has made",
            ),
        ):
            status, error = await post(path, said)
            assert (status, error["param"]) == (400, name) and words in error["message"]
        bombs = {"features": {**features, "kwargs_data": {"image": [bomb(100_000)]}}}
        status, error = await post("/all", bombs)
        assert status == 400 and "more than 10000 values" in error["message"]
        assert len(seen) == 3 and REFUSALS.labels("content")._value.get() == before + 5
