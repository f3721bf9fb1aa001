"""Another worker's KV cache, read in place: by CUDA IPC on GPUs, by process_vm_readv on CPUs.

For two workers of one machine no copy is faster: one kernel, or one system call, brings blocks from
the one cache into the other, on one GPU or between two, without a buffer, a communicator or the
source's help. On two H200s it moves 370 GB/s over NVLink and 2 TB/s on one device, and is ready in
milliseconds, where NCCL's communicator takes half a second and hundreds of MiB; and NCCL has no way
at all between two processes on one GPU.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llumnix.engine.vllm.kv.kv_memory import KvMemory, Piece

_MOST_VECTORS = 1024  # of one system call (IOV_MAX)
_SET_PTRACER, _ANY_PROCESS = 0x59616D61, ctypes.c_ulong(-1)  # of prctl: Yama's rule on who may read

Copy = Callable[[Sequence[int], Sequence[int]], None]


class NotReadable(Exception):
    """The other worker's memory can't be read; the message is one sentence."""


def export(memory: KvMemory) -> dict[str, Any] | None:
    """What another process of this machine needs to read this cache; None if it can't."""
    if memory.pieces is None:
        return None
    pieces = [list(piece) for piece in memory.pieces]
    storages = [layer.untyped_storage() for layer in memory.layers]
    if memory.device.type == "cuda":
        try:
            return {"pieces": pieces, "handles": [list(s._share_cuda_()) for s in storages]}
        except RuntimeError:  # memory of an allocator that has no handles, as vLLM's for sleeping
            return None
    _allow_reading()
    proof = [_proof().data_ptr(), bytes(_proof().tolist())]
    bases = [s.data_ptr() for s in storages]
    return {"pieces": pieces, "pid": os.getpid(), "bases": bases, "proof": proof}


class PeerMemory:
    """The blocks of another worker, from which blocks here can be filled."""

    def __init__(self, mine: KvMemory, theirs: dict[str, Any]) -> None:
        """Map what `export` said in the other process. Raises NotReadable."""
        if mine.pieces is None:
            raise NotReadable("this KV cache has a layout that can't be copied piece by piece")
        try:
            pieces = [Piece(*piece) for piece in theirs["pieces"]]
            make = _from_gpu if mine.device.type == "cuda" else _from_process
            self._copy: Copy = make(mine, pieces, theirs)
        except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
            raise NotReadable(f"the other KV cache can't be read: {error}") from error

    def pull(self, theirs: Sequence[int], mine: Sequence[int]) -> None:
        """Fill blocks here from blocks there, on a GPU on the current stream. Raises OSError."""
        self._copy(theirs, mine)


def _from_gpu(mine: KvMemory, pieces: Sequence[Piece], theirs: dict[str, Any]) -> Copy:
    from llumnix.engine.vllm.kv.block_copy import BlockCopy, addresses

    # The other's number of the device means nothing here, where the memory is mapped.
    here = mine.device.index
    mapped = [
        torch.UntypedStorage._new_shared_cuda(here, *handle[1:]) for handle in theirs["handles"]
    ]
    assert mine.pieces is not None
    own = [layer.untyped_storage().data_ptr() for layer in mine.layers]
    copy = BlockCopy(
        addresses(pieces, [s.data_ptr() for s in mapped]),
        addresses(mine.pieces, own),
        mine.device,
    )

    def pull(there: Sequence[int], here: Sequence[int]) -> None:
        assert mapped  # they stay mapped as long as somebody may pull
        copy(there, here)

    # Now, and not while a request waits: the kernel is compiled, if that was not done while the
    # engine started (`compiled_code`). Nothing reads block 0, which is vLLM's null block.
    pull([0], [0])
    torch.cuda.current_stream().synchronize()
    return pull


def _from_process(mine: KvMemory, pieces: Sequence[Piece], theirs: dict[str, Any]) -> Copy:
    assert mine.pieces is not None
    if [p.length for p in pieces] != [p.length for p in mine.pieces]:
        raise ValueError("the two KV caches are laid out in different pieces")
    pid, bases = int(theirs["pid"]), theirs["bases"]
    own = [layer.untyped_storage().data_ptr() for layer in mine.layers]
    both = list(zip(pieces, mine.pieces, strict=True))

    def pull(there: Sequence[int], here: Sequence[int]) -> None:
        spans = [
            (
                bases[a.tensor] + a.offset + source * a.stride,
                own[b.tensor] + b.offset + target * b.stride,
                b.length,
            )
            for a, b in both
            for source, target in zip(there, here, strict=True)
        ]
        for start in range(0, len(spans), _MOST_VECTORS):
            _read(pid, spans[start : start + _MOST_VECTORS])

    # Whether one may, and whether it is that process: another container has other numbers.
    address, proof = theirs["proof"]
    found = torch.empty(len(proof), dtype=torch.uint8)
    _read(pid, [(address, found.data_ptr(), len(proof))])
    if bytes(found.tolist()) != proof:
        raise ValueError(f"process {pid} is another one")
    return pull


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _read(pid: int, spans: Sequence[tuple[int, int, int]]) -> None:
    """Copy (address there, address here, bytes) out of another process. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    remote = (_Vector * len(spans))(*(_Vector(there, length) for there, _, length in spans))
    local = (_Vector * len(spans))(*(_Vector(here, length) for _, here, length in spans))
    wanted = sum(length for _, _, length in spans)
    count = libc.process_vm_readv(
        pid,
        local,
        ctypes.c_ulong(len(spans)),
        remote,
        ctypes.c_ulong(len(spans)),
        ctypes.c_ulong(0),
    )
    if count < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if count != wanted:
        raise OSError(f"only {count} of {wanted} bytes of process {pid} could be read")


@functools.cache
def _proof() -> torch.Tensor:
    """Bytes that only this process has; not made before it is forked, nor from torch's own seed."""
    return torch.tensor(list(os.urandom(16)), dtype=torch.uint8)


def _allow_reading() -> None:
    """Let processes of the same user read this one's memory, where Yama would not."""
    ctypes.CDLL(None).prctl(_SET_PTRACER, _ANY_PROCESS, 0, 0, 0)
