"""The messages of the peer channel, and their encoding: msgpack all the way down, never pickle.

A frame is one WebSocket message: the msgpack part, and behind it the tensors and arrays that
vLLM's encoder keeps out of band. Grouped by who receives them.
"""

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import CUSTOM_TYPE_RAW_VIEW, MsgpackDecoder, MsgpackEncoder, bytestr

from llumnix.cluster import InstanceId, NodeId
from llumnix.control.view_change import ViewChange
from llumnix.engine.base import EngineFacts


class FrameError(Exception):
    """What arrived is not a frame of this protocol."""


class Frame(msgspec.Struct, array_like=True, tag=True, gc=False):
    """The base of all frames."""


# ---- to the node that hosts an instance ----


class Submit(Frame, array_like=True, gc=False):
    """Run this request on `instance`; its outputs go back over the same connection."""

    instance: InstanceId
    epoch: int
    sequence: int  # number of the dispatch, see InstanceLoad.received
    request: EngineCoreRequest
    generated: list[int] = []  # outputs that it has already: it is resumed
    suspect: bool = False  # it may be what has killed its engines


class Cancel(Frame, array_like=True, gc=False):
    """The client is gone, or has all it wanted: end these requests.

    With `epochs`, one for each, only what runs in that epoch or an earlier one.
    """

    instance: InstanceId
    request_ids: list[str]
    epochs: list[int] = []


class Call(Frame, array_like=True, gc=False):
    """Call a utility method of an instance's engine; a Reply of the same id answers."""

    id: int
    instance: InstanceId
    method: str
    args: list[Any]


# ---- to the node that holds the client's connection ----


class Outputs(Frame, array_like=True, gc=False):
    """Everything that one step of an instance produced for one API server."""

    instance: InstanceId
    timestamp: float  # seconds, the engine's monotonic clock
    epochs: list[int]  # one for each output
    positions: list[int]  # of each output's first token
    outputs: list[EngineCoreOutput]
    stats: SchedulerStats | None = None  # for one API server process of the node itself


class Lost(Frame, array_like=True, gc=False):
    """The instance does not run these requests and never will: it is dead or never had them."""

    instance: InstanceId
    epochs: list[int]
    request_ids: list[str]
    reason: str
    retry: bool = True  # False: no other instance can run them either
    died: bool = False  # the engine has died while it had them
    together: bool = False  # it had several suspects on trial, of which one may have done it
    fault: str = ""  # the exception that ended it, if that was in a step which this one began with
    alone: bool = False  # and no other one did, or none that has got through no step anywhere


class HandOver(Frame, array_like=True, gc=False):
    """The instance has stopped this request, whose KV cache is at another instance by now."""

    instance: InstanceId
    epoch: int
    request_id: str
    destination: InstanceId
    node: NodeId  # of the destination


class Reply(Frame, array_like=True, gc=False):
    """The answer to a Call: a result, or one sentence that tells why there is none."""

    id: int
    result: Any = None
    error: str | None = None


# ---- to an API server process of the node itself ----


class NodeNews(Frame, array_like=True, gc=False):
    """What a node knows, for those of its API servers that are processes of their own."""

    change: ViewChange | None  # of the cluster since the last one; None: nothing has changed
    anew: bool  # whether it is the first on its link, and tells of all that there is
    age: float  # seconds since the view was last proven current
    fault: str  # what of the node has died or hangs; empty if nothing
    warnings: list[dict[str, Any]]  # of what was found wrong in etcd lately
    stopping: bool  # whether the node takes no new requests any more
    facts: EngineFacts | None  # of one of its instances that is up


# ---- to the node that has dialled ----


class Hello(Frame, array_like=True, gc=False):
    """The first frame on a link, by which the node that was dialled proves to be still the same."""

    node: NodeId
    version: str
    proof: str = ""


AnyFrame = Submit | Cancel | Call | Outputs | Lost | HandOver | Reply | Hello | NodeNews

# What goes to an API server about its requests.
News = Outputs | Lost | HandOver

_LENGTH = struct.Struct("<I")


class _Decoder(MsgpackDecoder):
    def ext_hook(self, code: int, data: memoryview) -> Any:
        """Arrays only: no pickle, whatever VLLM_ALLOW_INSECURE_SERIALIZATION says."""
        if code != CUSTOM_TYPE_RAW_VIEW:
            raise NotImplementedError(f"there is no extension type {code} in a frame")
        return data


class Codec:
    """Encodes and decodes frames; one for each connection (the encoder keeps state)."""

    def __init__(self) -> None:
        self._encoder = MsgpackEncoder()
        self._decoder = _Decoder(AnyFrame)

    def encode(self, frame: Frame) -> bytes:
        """One WebSocket message: count of parts, their lengths, then the parts."""
        parts: Sequence[bytestr] = self._encoder.encode(frame)
        head = [_LENGTH.pack(len(parts))]
        sizes = [p.nbytes if isinstance(p, memoryview) else len(p) for p in parts]
        head += [_LENGTH.pack(size) for size in sizes]
        return b"".join([*head, *parts])

    def decode(self, message: bytes) -> Frame:
        """The frame of a message. Raises FrameError on anything that encode() did not make."""
        try:
            frame = self._decoder.decode(_parts(message))
        except Exception as error:  # vLLM's hooks for arrays raise whatever comes, even asserts
            raise FrameError(f"not a llumnix frame: {error or type(error).__name__}") from error
        if not isinstance(frame, Frame):
            raise FrameError(f"not a llumnix frame: {type(frame).__name__}")
        return frame


def _parts(message: bytes) -> list[memoryview]:
    (count,) = _LENGTH.unpack_from(message)
    view = memoryview(message)
    start = _LENGTH.size * (count + 1)
    parts = []
    for n in range(count):
        (size,) = _LENGTH.unpack_from(message, _LENGTH.size * (n + 1))
        parts.append(view[start : start + size])
        start += size
    if start != len(message):
        raise ValueError(f"{len(message)} bytes came, but its parts make {start}")
    return parts
