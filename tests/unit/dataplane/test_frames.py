"""Every frame survives the wire as it was; what is no frame is refused, and nothing runs."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from llumnix.dataplane.frames import (
    Call,
    Cancel,
    Codec,
    Frame,
    FrameError,
    Hello,
    Lost,
    Outputs,
    Reply,
    Submit,
)
from tests.kit.requests import core_request

PLAIN: list[Frame] = [
    Hello("node-a", "0.1.0"),
    Cancel("a-0", ["r1", "r2", "ünïcode"]),
    Cancel("a-0", []),
    Call(7, "a-0", "add_lora", [1, "two", None, True, 2.5, [1, {"k": b"v"}]]),
    Reply(7, {"answer": [1, 2]}),
    Reply(8, error="instance a-0 is dead"),
    Lost("a-0", [3, 1], ["r1", "r2"], "instance a-0 died: killed by SIGKILL (exit -9)"),
    Lost("a-0", [3], ["r1"], "too long", retry=False),
    Outputs("a-0", 12.5, [], [], []),
]


def through(frame: Frame) -> Any:
    """The frame as the other end has it, by codecs that share nothing."""
    return Codec().decode(Codec().encode(frame))


@pytest.mark.parametrize("frame", PLAIN, ids=lambda frame: type(frame).__name__)
def test_a_plain_frame_survives(frame: Frame) -> None:
    assert through(frame) == frame


def test_a_request_survives_with_all_its_parameters() -> None:
    params = SamplingParams(
        n=1,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=2**40,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        stop=["\n\n", "END"],
        stop_token_ids=[2, 7],
        max_tokens=33,
        min_tokens=3,
        logprobs=5,
        prompt_logprobs=2,
        logit_bias={17: -100.0, 42: 3.5},
        bad_words=["no"],
        structured_outputs=StructuredOutputsParams(json='{"type": "object"}'),
        output_kind=RequestOutputKind.DELTA,
        extra_args={"key": "value"},
    )
    request = EngineCoreRequest(
        request_id="chatcmpl-1",
        prompt_token_ids=list(range(3000)),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=1234.5,
        lora_request=None,
        cache_salt="salt",
        data_parallel_rank=None,
        prompt_embeds=torch.arange(6000, dtype=torch.float32).reshape(2, 3000),
        priority=-3,
        trace_headers={"traceparent": "00-1-2-03"},
        external_req_id="1",
    )
    frame = through(Submit("b-1", 4, 99, request))
    assert (frame.instance, frame.epoch, frame.sequence) == ("b-1", 4, 99)
    there = frame.request
    assert isinstance(there, EngineCoreRequest)
    assert torch.equal(there.prompt_embeds, request.prompt_embeds)
    there.prompt_embeds = request.prompt_embeds = None
    # Compared field by field: some objects in there have no equality of their own.
    assert msgspec.to_builtins(there) == msgspec.to_builtins(request)
    assert there.sampling_params.structured_outputs.json == '{"type": "object"}'
    assert there.sampling_params.output_kind is RequestOutputKind.DELTA


@pytest.mark.parametrize("tokens", [1, 500], ids=["inline", "out of band"])
def test_outputs_survive_with_logprobs(tokens: int) -> None:
    ranks = np.arange(tokens, dtype=np.int64)
    ids = np.arange(tokens * 6, dtype=np.int32).reshape(tokens, 6)
    logprobs = LogprobsLists(ids, -ids.astype(np.float32) / 7, ranks)
    prompt = LogprobsTensors(
        torch.arange(tokens * 3).reshape(tokens, 3),
        torch.randn(tokens, 3),
        torch.arange(tokens, dtype=torch.int32),
    )
    output = EngineCoreOutput(
        "r1",
        list(range(tokens)),
        new_logprobs=logprobs,
        new_prompt_logprobs_tensors=prompt,
        finish_reason=FinishReason.STOP,
        stop_reason="END",
        events=[EngineCoreEvent(EngineCoreEventType.PREEMPTED, 1.5)],
    )
    bare = EngineCoreOutput("r2", [5])
    frame = through(Outputs("a-0", 3.25, [1, 2], [0, 17], [output, bare]))
    assert (frame.timestamp, frame.epochs, frame.positions) == (3.25, [1, 2], [0, 17])
    there, other = frame.outputs
    assert (there.request_id, there.new_token_ids) == ("r1", list(range(tokens)))
    assert (there.finish_reason, there.stop_reason) == (FinishReason.STOP, "END")
    assert there.events == output.events
    for mine, theirs in zip(logprobs[:3], there.new_logprobs[:3], strict=True):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    for mine, theirs in zip(prompt[:3], there.new_prompt_logprobs_tensors[:3], strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert (other.request_id, other.new_token_ids, other.finish_reason) == ("r2", [5], None)


def test_a_codec_keeps_nothing_between_frames() -> None:
    codec, other = Codec(), Codec()
    large = EngineCoreOutput("r", [1], routed_experts=np.zeros((64, 64), dtype=np.int32))
    for _ in range(3):
        with_array = other.decode(codec.encode(Outputs("a-0", 1.0, [1], [0], [large])))
        assert with_array.outputs[0].routed_experts.shape == (64, 64)
        assert other.decode(codec.encode(Hello("a", "1"))) == Hello("a", "1")


# ---- what is no frame ----


def packed(*parts: bytes) -> bytes:
    """A message of these parts, as Codec.encode() lays them out."""
    head = struct.pack("<I", len(parts)) + b"".join(struct.pack("<I", len(p)) for p in parts)
    return head + b"".join(parts)


def refused(message: bytes) -> None:
    with pytest.raises(FrameError):
        Codec().decode(message)


SUBMIT = Codec().encode(Submit("a-0", 1, 1, core_request("r", [1, 2, 3])))
TENSORS = Codec().encode(
    Outputs(
        "a-0",
        1.0,
        [1],
        [0],
        [
            EngineCoreOutput(
                "r",
                [1],
                new_prompt_logprobs_tensors=LogprobsTensors(
                    torch.zeros(100, 3, dtype=torch.int64),
                    torch.zeros(100, 3),
                    torch.zeros(100, dtype=torch.int32),
                ),
                routed_experts=np.zeros((64, 64), dtype=np.int32),
            )
        ],
    )
)


@pytest.mark.parametrize(
    "body",
    [
        {"not": "a frame"},
        ["Nothing", 1],
        ["Hello"],
        ["Hello", 1, 2],
        ["Cancel", "a-0", "r1"],
        ["Outputs", "a-0", 1.0, [1], [0], [["r", "no list"]]],
        None,
        17,
        "Hello",
    ],
)
def test_well_formed_msgpack_that_is_no_frame(body: Any) -> None:
    refused(packed(msgspec.msgpack.encode(body)))


@pytest.mark.parametrize(
    "array",
    [
        ["no_such_dtype", [1], 0],
        ["float32", [5], 99],  # no such part
        ["float32", [7], 1],  # another shape
        ["__builtins__", [1], 1],
        ["float32", [1], {"shm": "x"}],
        ["float32"],
        [3, [1], 1],
        None,
    ],
)
@pytest.mark.parametrize("field", [3, 12], ids=["tensor", "array"])
def test_arrays_that_are_none(array: Any, field: int) -> None:
    output: list[Any] = ["r", [1], None] + [None] * 9 + [None]
    output[field] = [array, array, array] if field == 3 and array is not None else array
    if array is None:
        output[0] = None
    body = ["Outputs", "a-0", 1.0, [1], [0], [output]]
    refused(packed(msgspec.msgpack.encode(body), b"12345678"))


@pytest.mark.parametrize("whole", [SUBMIT, TENSORS], ids=["request", "tensors"])
def test_a_frame_cut_short_anywhere(whole: bytes) -> None:
    Codec().decode(whole)
    for end in [*range(200), *range(200, len(whole), 97), len(whole) - 1]:
        if end < len(whole):
            refused(whole[:end])


def test_a_frame_with_more_behind_it() -> None:
    refused(SUBMIT + b"x")


@pytest.mark.parametrize("count", [0, 1, 2**31, 2**32 - 1])
def test_a_count_that_lies(count: int) -> None:
    refused(struct.pack("<I", count))
    refused(struct.pack("<II", count, 2**32 - 1) + b"\x90")


class Explosive:
    """A pickle of this leaves a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("insecure", ["0", "1"], ids=["", "insecure serialization allowed"])
def test_a_pickle_is_never_loaded(
    insecure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", insecure)
    trace = tmp_path / "loaded"
    payload = pickle.dumps(Explosive(trace))
    refused(payload)
    refused(packed(payload))
    for code in range(1, 8):
        extension = msgspec.msgpack.encode(["Reply", 1, msgspec.msgpack.Ext(code, payload)])
        try:
            Codec().decode(packed(extension))
        except FrameError:
            continue
        assert code == 3, "raw bytes stay bytes"
    assert not trace.exists()


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_junk(message: bytes) -> None:
    refused(message)


@settings(max_examples=300)
@given(
    whole=st.sampled_from([SUBMIT, TENSORS[:600]]),
    place=st.integers(0, 599),
    byte=st.integers(0, 255),
)
def test_a_frame_with_a_byte_changed(whole: bytes, place: int, byte: int) -> None:
    """It is refused or still a frame; nothing else is raised."""
    damaged = bytearray(whole)
    damaged[place % len(whole)] = byte
    try:
        frame = Codec().decode(bytes(damaged))
    except FrameError:
        return
    assert isinstance(frame, Frame)


TAGS = ("Submit", "Cancel", "Call", "Outputs", "Lost", "HandOver", "Reply", "Hello", "X")
JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300)
@given(
    tag=st.sampled_from(TAGS),
    fields=st.lists(JSON_LIKE, max_size=7),
)
def test_fields_of_any_kind(tag: str, fields: list[Any]) -> None:
    try:
        frame = Codec().decode(packed(msgspec.msgpack.encode([tag, *fields])))
    except FrameError:
        return
    assert type(frame).__name__ == tag
