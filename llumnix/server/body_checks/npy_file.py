"""The head of a file of numpy.save, which says how large an array is to be made of what follows."""

import io
import math
from typing import Any

import numpy as np

from llumnix.server.body_checks.base64_text import Base64Text
from llumnix.server.body_checks.torch_file import NoTensor

PREFIX = b"\x93NUMPY"
_HEAD_BYTES = 4096  # numpy itself takes 10,000


def check_npy_file(data: Base64Text) -> None:
    """Raise NoTensor for an array that is not of plain numbers, or larger than its bytes."""
    file = io.BytesIO(data.read(0, _HEAD_BYTES))
    head: Any = np.lib.format  # it has no types
    try:
        version = head.read_magic(file)
        if version == (1, 0):
            shape, _, kind = head.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, kind = head.read_array_header_2_0(file)
        else:
            raise NoTensor("its version is none of numpy's")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise NoTensor("it is no file that numpy.save has written") from error
    if kind.kind not in "fiub" or any(n < 0 for n in shape):
        raise NoTensor("it is no array of numbers")
    if math.prod(shape) * kind.itemsize > data.size - file.tell():
        raise NoTensor("it says that it has more items than it has")
