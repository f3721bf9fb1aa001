"""Files of torch.save and numpy.save, right ones and such as an attacker makes."""

import base64
import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def text(data: bytes) -> str:
    """Bytes as JSON has them."""
    return base64.b64encode(data).decode()


def saved(value: Any, old: bool = False) -> bytes:
    """A file of torch.save, in the format of before 2020 if it is to be `old`."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def rezipped(
    data: bytes,
    change: Callable[[str, bytes], bytes] = lambda name, content: content,
    method: int = zipfile.ZIP_STORED,
    more: tuple[str, ...] = (),
) -> bytes:
    """The same zip with its files changed, packed by `method`, and with `more` files."""
    before, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as after:
        for name in before.namelist():
            after.writestr(name, change(name, before.read(name)))
        for name in more:
            after.writestr(name, b"x")
    return file.getvalue()


def with_pickle(pickle: bytes, data: bytes | None = None) -> bytes:
    """A tensor's file with another pickle."""
    whole = data or saved(torch.zeros(2, 3))
    return rezipped(whole, lambda name, old: pickle if name.endswith("data.pkl") else old)


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """A file of numpy.save."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
