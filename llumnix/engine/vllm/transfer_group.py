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

from llumnix.engine.vllm.carrier import RECEIVER, SENDER

POLL = 0.0002  # seconds between looks at what a GPU has under way
_UNUSED_TAG = 999


class TransferGroup:
    """One group of two workers; used by one thread, aborted from any."""

    def __init__(self, sends: bool, device: torch.device) -> None:
        """`device`: whose tensors it carries, of a GPU or the CPU."""
        self.aborted = False
        self._rank = SENDER if sends else RECEIVER
        self._cuda = device.type == "cuda"
        self._device = device
        self._group: Any = None
        self._deadline = 0.0
        self._lock = threading.Lock()

    def open(self, store: Any, address: str, seconds: float) -> None:
        """Meet the other worker through the store, within so many seconds. Raises RuntimeError.

        `address` is that of this machine, at which the other worker can reach it.
        """
        within = timedelta(seconds=seconds)
        if self._cuda:
            self._group = _nccl(PrefixStore("g", store), self._rank, within)
        else:
            self._group = _gloo(store, self._rank, address, within)
        # NCCL connects with the first operation, and it is to be known here whether it can. And
        # when something has come through both ways, neither needs the store for this any more.
        self.begin(time.monotonic() + seconds)
        first = torch.zeros(1, device=self._device)
        peer = 1 - self._rank
        ways = [
            lambda: self._group.send([first], peer, 0),
            lambda: self._group.recv([first], peer, 0),
        ]
        for way in ways if self._rank == SENDER else reversed(ways):
            self.wait(way())
        self.settle()

    def begin(self, deadline: float) -> None:
        """Work begins that must end at `deadline` (monotonic)."""
        self._deadline = deadline

    def send(self, tensor: torch.Tensor) -> Any:
        """Begin to send a tensor to the receiver."""
        return self._group.send([tensor], RECEIVER, 0)

    def receive(self, tensor: torch.Tensor) -> Any:
        """Begin to receive a tensor from the sender."""
        return self._group.recv([tensor], SENDER, 0)

    def wait(self, work: Any) -> None:
        """Wait for what was begun; on a GPU only what is put on the current stream later waits."""
        left = self._deadline - time.monotonic()
        if left <= 0 or self.aborted:
            raise TimeoutError("the transfer's time is over")
        if self._cuda:
            work.wait()
        else:
            work.wait(timedelta(seconds=left))
        if self.aborted:
            raise TimeoutError("the transfer was cut off")

    def settle(self) -> None:
        """Wait until the current stream has done what it was given. Raises TimeoutError."""
        if not self._cuda:
            return
        end = torch.cuda.current_stream().record_event()
        while not end.query():
            if time.monotonic() > self._deadline or self.aborted:
                raise TimeoutError("the transfer's time is over")
            time.sleep(POLL)
        if self.aborted:
            raise TimeoutError("the transfer was cut off")

    def abort(self) -> None:
        """Cut off a pending operation, from another thread."""
        self.aborted = True
        with self._lock:
            if self._group is None:
                return
            if self._cuda:
                self._group.abort()
            else:
                _poison(self._group, 1 - self._rank)

    def close(self) -> None:
        """Give up the group."""
        self.abort()
        with self._lock:
            self._group = None


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
