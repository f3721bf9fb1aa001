"""A transfer group: a torch.distributed process group of two ranks, the sender and the receiver.

Gloo carries tensors on CPUs, NCCL those on GPUs. Each operation has a deadline; a group that has
failed or was aborted is thrown away and made anew.
"""

import contextlib
import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo
from vllm.utils.import_utils import resolve_obj_by_qualname

SENDER, RECEIVER = 0, 1
MEET_SECONDS = 3.0  # to make a group; a Gloo listener whose peer dies then waits five times that
_UNUSED_TAG = 999


class TransferGroup:
    """One group of two workers; used by one thread, aborted from any."""

    def __init__(self, name: str, key: str, sends: bool, device: torch.device) -> None:
        self.name = name
        self.aborted = False
        self._key = key
        self._rank = SENDER if sends else RECEIVER
        self._device = device
        self._store: Any = None
        self._group: Any = None
        self._deadline = 0.0
        self._lock = threading.Lock()

    def open(self, store: tuple[str, dict[str, Any]], address: str, seconds: float) -> None:
        """Meet the other worker through the store, within so many seconds.

        `address` is that of this machine, at which the other worker can reach it.
        """
        seconds = min(seconds, MEET_SECONDS)
        factory, options = store
        prefix = f"{options['prefix']}{self._key}/"
        self._store = resolve_obj_by_qualname(factory)(
            **(options | {"prefix": prefix, "timeout": seconds})
        )
        within = timedelta(seconds=seconds)
        if self._device.type == "cuda":
            self._group = _nccl(PrefixStore("g", self._store), self._rank, within)
        else:
            self._group = _gloo(self._store, self._rank, address, within)

    def begin(self, seconds: float) -> None:
        """A job begins, which may take so many seconds in all."""
        self._deadline = time.monotonic() + seconds

    def end(self) -> None:
        """A job has come through, so both have met: the rendezvous leaves no keys behind.

        NCCL uses the store as long as it lives.
        """
        if self._device.type != "cuda":
            self._store.close()

    def send(self, tensor: torch.Tensor) -> None:
        """Send a tensor to the receiver; returns when it may be written again."""
        self._wait(self._group.send([tensor], RECEIVER, 0))

    def receive(self, tensor: torch.Tensor) -> None:
        """Receive a tensor from the sender; returns when it is there."""
        self._wait(self._group.recv([tensor], SENDER, 0))

    def abort(self) -> None:
        """Cut off a pending operation, from another thread."""
        self.aborted = True
        with self._lock:
            if self._group is None:
                return
            if self._device.type == "cuda":
                self._group.abort()
            else:
                _poison(self._group, 1 - self._rank)

    def close(self) -> None:
        """Give up the group and its keys in the store."""
        self.abort()
        with self._lock:
            self._group = None
        if self._store is not None:
            self._store.close()

    def _wait(self, work: Any) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0 or self.aborted:
            raise TimeoutError("the transfer's time is over")
        if self._device.type == "cuda":
            # NCCL's own wait only orders streams: the end is seen here, and its deadline kept.
            while not work.is_completed():
                if time.monotonic() > self._deadline or self.aborted:
                    raise TimeoutError("the transfer's time is over")
                time.sleep(0.0005)
        work.wait(timedelta(seconds=left))
        if self.aborted:
            raise TimeoutError("the transfer was cut off")


def _gloo(store: Any, rank: int, address: str, within: timedelta) -> Any:
    options = ProcessGroupGloo._Options()
    options._timeout = within
    # Without it Gloo publishes what the host's name resolves to, which may be the loopback.
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    return ProcessGroupGloo(store, rank, 2, options)


def _poison(group: Any, peer: int) -> None:
    """End all that is pending on a Gloo group: its own abort does nothing, a timeout does."""
    with contextlib.suppress(RuntimeError):
        group.recv([torch.zeros(1)], peer, _UNUSED_TAG).wait(timedelta(milliseconds=1))


def _nccl(store: Any, rank: int, within: timedelta) -> Any:
    from torch.distributed import ProcessGroupNCCL

    # vLLM's own groups are watched by NCCL's monitor; these are by their deadlines.
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    options = ProcessGroupNCCL.Options()
    options._timeout = within
    return ProcessGroupNCCL(store, rank, 2, options)
