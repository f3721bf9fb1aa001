"""What carries KV blocks from one worker to another, and how two workers agree on it.

- `memory`: the receiver reads the sender's cache in place (`peer_memory`): between workers of one
  machine, where both can.
- `group`: a torch.distributed group of the two, NCCL between GPUs and Gloo between CPUs.
- `host`: Gloo between GPUs, through buffers in the machines' memory: NCCL takes no two processes on
  one GPU, and may be cut off between machines.

Both workers are told the same ladder, which gets shorter by its first way each time that they could
not be set up.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch

from llumnix.engine.vllm.kv.kv_memory import KvMemory

SENDER, RECEIVER = 0, 1
READ_SECONDS = 1.0  # for the other worker to read that there is no way
LADDER = ("memory", "group", "host")  # the ways, in the order in which they are tried

# While blocks are read or written; raises TimeoutError after the transfer was cut off.
Touching = Callable[[], AbstractContextManager[None]]


class SetupError(Exception):
    """Two workers could not make a way for blocks; the message is one sentence."""


class Absent(Exception):
    """The other worker did not come in time, which says nothing of the ways to it."""


class Carrier(ABC):
    """One direction between two workers; used by one thread, aborted from any."""

    kind: str
    aborted = False

    @property
    def gone(self) -> bool:
        """Whether the other end is known to have gone, and nothing will come any more."""
        return False

    def send(self, blocks: list[int], deadline: float, touching: Touching) -> None:
        """Send blocks; returns when they have left. Raises TimeoutError, OSError, RuntimeError."""
        raise OSError("this end of a transfer only receives")

    def receive(self, blocks: list[int], deadline: float, touching: Touching) -> None:
        """Fill blocks with what the sender sends; returns when they are filled."""
        raise OSError("this end of a transfer only sends")

    @abstractmethod
    def abort(self) -> None:
        """Cut off what is under way, from another thread."""

    @abstractmethod
    def close(self) -> None:
        """Release everything."""


class WorkerPlace(msgspec.Struct):
    """What a worker says of itself when it meets another one."""

    host: str  # names the machine, not the container
    device: str  # names the GPU; "cpu"
    ladder: list[str]  # the ways that it can go
    memory: Any = None  # the sender's, as `peer_memory.export` says
    address: tuple[str, int] = ("", 0)  # at which the sender listens, for the way through memory
    key: bytes = b""  # that the receiver shows there


def identify(memory: KvMemory, ladder: list[str]) -> WorkerPlace:
    """This worker, as far as it matters to a carrier."""
    host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    device = "cpu"
    if memory.device.type == "cuda":
        device = str(torch.cuda.get_device_properties(memory.device).uuid)
    return WorkerPlace(host, device, ladder)


def ways(me: WorkerPlace, other: WorkerPlace, rank: int) -> list[str]:
    """The ways that both can go, the best first, for the worker of this rank."""
    sender, receiver = (me, other) if rank == SENDER else (other, me)
    found = []
    for kind in sender.ladder:
        if kind not in receiver.ladder:
            continue
        if kind == "memory" and (sender.host != receiver.host or sender.memory is None):
            continue
        if kind == "group" and sender.device == receiver.device != "cpu":
            continue  # NCCL has no way between two processes on one GPU
        found.append(kind)
    return found


def exchange(store: Any, rank: int, me: WorkerPlace, seconds: float) -> WorkerPlace:
    """Tell the other worker who this is, and hear who it is. Raises Absent."""
    other = f"self/{1 - rank}"
    try:
        store.set(f"self/{rank}", msgspec.msgpack.encode(me))
        store.wait([other], timedelta(seconds=seconds))
        found = msgspec.msgpack.decode(store.get(other), type=WorkerPlace)
        if not ways(me, found, rank):
            # Both end here, but not before the other has read what this one said: that it says, or
            # its own has gone by then.
            store.set(f"read/{rank}", b"1")
            with contextlib.suppress(RuntimeError):
                store.wait([f"read/{1 - rank}"], timedelta(seconds=min(seconds, READ_SECONDS)))
        return found
    except (RuntimeError, msgspec.MsgspecError) as error:
        raise Absent(f"the other worker did not come: {error}") from error
