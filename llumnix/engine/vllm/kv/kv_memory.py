"""A worker's KV cache as blocks: tensors with the block in front, and pieces of plain memory.

Copies through torch.distributed want tensors; a copy out of another process's memory wants to know
where the bytes of each block lie. Both are two looks at the same cache, whatever the layout that
an attention backend has chosen for it.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

STAGING_BYTES = 32 * 2**20  # of one chunk of a copy that goes through a buffer
_MOST_PIECES = 4  # of a block in one layer; a layout that scatters it more is not copied by pieces


class Piece(NamedTuple):
    """Where one contiguous part of every block of one layer lies; all in bytes."""

    tensor: int  # index of the layer
    offset: int  # of block 0, from the beginning of the layer's storage
    stride: int  # from one block to the next
    length: int


class KvMemory:
    """The KV cache of one worker: one tensor for each layer, the block in the first dimension."""

    def __init__(self, tensors: Sequence[torch.Tensor], blocks: int) -> None:
        self.first = tensors[0]
        seen: dict[int, torch.Tensor] = {}
        for tensor in tensors:
            seen.setdefault(tensor.data_ptr(), _by_block(tensor, blocks))
        self.layers = list(seen.values())
        self.device = self.layers[0].device
        self.blocks = blocks
        self.block_bytes: int = sum(t[0].numel() * t.element_size() for t in self.layers)

    @cached_property
    def pieces(self) -> tuple[Piece, ...] | None:
        """Every block as pieces of memory; None if a layout scatters blocks too widely."""
        found: list[Piece] = []
        for index, layer in enumerate(self.layers):
            of_layer = _pieces(index, layer)
            if len(of_layer) > _MOST_PIECES:
                return None
            found += of_layer
        return tuple(found)

    def chunks(self, blocks: list[int]) -> Iterator[torch.Tensor]:
        """The block ids in portions that fit the staging buffer."""
        size = max(STAGING_BYTES // self.block_bytes, 1)
        for start in range(0, len(blocks), size):
            yield torch.tensor(blocks[start : start + size], device=self.device)

    def parts(self, staging: torch.Tensor, count: int) -> list[torch.Tensor]:
        """A staging buffer of bytes, cut into room for `count` blocks of every layer."""
        sizes = [count * t[0].numel() * t.element_size() for t in self.layers]
        parts = staging[: sum(sizes)].split(sizes)
        return [
            part.view(layer.dtype).view(count, *layer.shape[1:])
            for part, layer in zip(parts, self.layers, strict=True)
        ]

    def gather(self, ids: torch.Tensor, staging: torch.Tensor) -> torch.Tensor:
        """Copy blocks into a staging buffer; the part of it that they fill."""
        for layer, part in zip(self.layers, self.parts(staging, len(ids)), strict=True):
            torch.index_select(layer, 0, ids, out=part)
        return staging[: len(ids) * self.block_bytes]

    def scatter(self, ids: torch.Tensor, staging: torch.Tensor) -> None:
        """Copy what a staging buffer holds into blocks."""
        for layer, part in zip(self.layers, self.parts(staging, len(ids)), strict=True):
            layer.index_copy_(0, ids, part)


def _by_block(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """The same memory with the block in front, whatever the attention backend's layout is."""
    for dimension, size in enumerate(tensor.shape):
        if size == blocks:
            return tensor.movedim(dimension, 0)
        if size % blocks == 0 and size > blocks:  # the kernel's blocks are parts of the manager's
            return tensor.unflatten(dimension, (blocks, size // blocks)).movedim(dimension, 0)
    raise ValueError(f"a KV cache of shape {tuple(tensor.shape)} is not one of {blocks} blocks")


def _pieces(index: int, layer: torch.Tensor) -> list[Piece]:
    """The contiguous parts of a block: as many inner dimensions as lie densely make one."""
    item = layer.element_size()
    dims = sorted((s * item, n) for s, n in zip(layer.stride()[1:], layer.shape[1:], strict=True))
    length = item
    outer: list[tuple[int, int]] = []
    for stride, size in dims:
        if size == 1:
            continue
        if not outer and stride == length:
            length *= size
        else:
            outer.append((stride, size))
    begin, step = layer.storage_offset() * item, layer.stride(0) * item
    offsets = itertools.product(*(range(0, stride * size, stride) for stride, size in outer))
    return [Piece(index, begin + sum(offset), step, length) for offset in offsets]
