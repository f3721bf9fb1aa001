"""What a file of torch.save would become if it were loaded, read without loading it.

Such a file is a zip with a pickle that says what tensor to make of the bytes beside it. A zip may
be compressed a thousandfold, a pickle is a program, and the tensor may be a million times as large
as its bytes: strides of 0, sparse, nested, on no device. Only what torch.save writes for one dense
tensor passes.
"""

import math
import pickletools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llumnix.server.body_checks.base64_text import Base64Text

PICKLE_BYTES = 4096  # a tensor takes some 200
_DIRECTORY_BYTES = 16 * 1024  # the files of a zip; torch writes 7
_SMALL_BYTES = 1024  # of those that are neither the pickle nor the tensor's bytes
_DIMENSIONS = 8

_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED = 1
_SMALL = ("version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
_BYTES = re.compile(r"data/\d{1,9}")
_NUMBERS = re.compile(r"(bfloat|float|int|uint|complex)\d{1,3}(_e\dm\d[a-z]{0,5})?|bool")

_STORAGES = {  # bytes of an item
    **{"torch DoubleStorage": 8, "torch FloatStorage": 4, "torch HalfStorage": 2},
    **{"torch BFloat16Storage": 2, "torch LongStorage": 8, "torch IntStorage": 4},
    **{"torch ShortStorage": 2, "torch CharStorage": 1, "torch ByteStorage": 1},
    **{"torch BoolStorage": 1, "torch ComplexDoubleStorage": 16, "torch ComplexFloatStorage": 8},
}
_UNTYPED = "torch.storage UntypedStorage"
_DEVICES = ("cpu", "cuda", "xpu", "hpu", "npu", "mps")  # memory is what they have in common


class NoTensor(ValueError):
    """A file that is not loaded; the message says why."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A global of Python's, by its module and name."""

    name: str


@dataclass(frozen=True, slots=True)
class _Call:
    function: Any
    arguments: Any


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the pickle says of bytes beside it."""

    said: Any


def check_torch_file(data: Base64Text, moved: bool) -> None:
    """Raise NoTensor unless it is a plain tensor of no more bytes than are there.

    `moved`: whether the loader takes tensors of other devices to the CPU.
    """
    try:
        files = _files(data)
        start, size = files["data.pkl"]
        if size > PICKLE_BYTES:
            raise NoTensor(f"its pickle has more than {PICKLE_BYTES} bytes")
        _check_tensor(_made(data.read(start, size)), files, moved)
    except NoTensor:
        raise
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise NoTensor("it is no file that torch.save has written of a tensor") from error


def _files(data: Base64Text) -> dict[str, tuple[int, int]]:
    """Where the files of the zip begin, and how long they are, by their names in its folder."""
    at = data.size - _END.size
    mark, _, _, here, count, length, begins, comment = _END.unpack(data.read(at, _END.size))
    if mark != b"PK\5\6" or comment or here != count:
        raise NoTensor("it is no zip file, which torch.save writes")
    ends = at
    before = data.read(at - _LOCATOR64.size, _LOCATOR64.size)
    if before[:4] == b"PK\6\7":  # torch writes both ends, which must say the same
        ends -= _LOCATOR64.size + _END64.size
        if _LOCATOR64.unpack(before)[2] != ends:
            raise NoTensor("it is no zip file that torch.save has written")
        end = _END64.unpack(data.read(ends, _END64.size))
        if end[0] != b"PK\6\6" or end[6:] != (count, count, length, begins):
            raise NoTensor("it is no zip file that torch.save has written")
    if begins + length != ends or length > _DIRECTORY_BYTES:
        raise NoTensor("it is no zip file that torch.save has written")
    directory = data.read(begins, length)
    files: dict[str, tuple[int, int]] = {}
    folders = set()
    at = 0
    while at < length:
        entry = _ENTRY.unpack_from(directory, at)
        flags, method, packed, size, name_bytes, extra, remark, local = (
            *(entry[3], entry[4], entry[8], entry[9], entry[10], entry[11], entry[12], entry[16]),
        )
        at += _ENTRY.size
        folder, _, name = directory[at : at + name_bytes].decode("ascii").partition("/")
        at += name_bytes + extra + remark
        folders.add(folder)
        if entry[0] != b"PK\1\2" or name in files or len(folders) > 1:
            raise NoTensor("it is no zip file that torch.save has written")
        if method or packed != size or flags & _ENCRYPTED:
            raise NoTensor("it is compressed, which torch.save does not do")
        whole = name == "data.pkl" or _BYTES.fullmatch(name)
        if not whole and (name not in _SMALL or size > _SMALL_BYTES):
            raise NoTensor("it holds other files than those of a tensor")
        head = _LOCAL.unpack(data.read(local, _LOCAL.size))
        start = local + _LOCAL.size + head[9] + head[10]
        if head[0] != b"PK\3\4" or start + size > begins:
            raise NoTensor("it is no zip file that torch.save has written")
        files[name] = (start, size)
    if at != length or len(files) != count:
        raise NoTensor("it is no zip file that torch.save has written")
    return files


def _made(pickle: bytes) -> Any:
    """What the pickle says, of which nothing is run."""
    stack: list[Any] = []
    marks: list[int] = []
    kept: dict[int, Any] = {}
    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(pickle)
    for opcode, argument, _ in operations:
        name: str = opcode.name
        if name == "GLOBAL":
            stack.append(_Name(argument))
        elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(argument)
        elif name in ("NEWTRUE", "NEWFALSE"):
            stack.append(name == "NEWTRUE")
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            first = marks.pop() if name == "TUPLE" else len(stack) - int(name[-1])
            if first < 0:
                raise NoTensor("its pickle is broken")
            stack[first:] = [tuple(stack[first:])]
        elif name == "BINPERSID":
            stack.append(_Stored(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_Call(stack.pop(), arguments))
        elif name in ("BINPUT", "LONG_BINPUT"):
            kept[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(kept[argument])
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise NoTensor("it holds something else than a dense tensor")
    raise NoTensor("its pickle has no end")


def _check_tensor(made: Any, files: dict[str, tuple[int, int]], moved: bool) -> None:
    if _calls(made, "torch._utils _rebuild_parameter"):
        made = made.arguments[0]
    if _calls(made, "torch._utils _rebuild_tensor_v2"):
        stored, offset, sizes, strides, _, hooks = made.arguments
        item = 0  # as its storage says
    elif _calls(made, "torch._utils _rebuild_tensor_v3"):
        stored, offset, sizes, strides, _, hooks, kind = made.arguments
        item = _item_bytes(kind)
    else:
        raise NoTensor("it is not one dense tensor of memory")
    if not _calls(hooks, "collections OrderedDict") or not isinstance(stored, _Stored):
        raise NoTensor("it is not one dense tensor of memory")
    word, storage, key, device, count = stored.said
    if word != "storage" or not isinstance(storage, _Name) or not isinstance(device, str):
        raise NoTensor("it is not one dense tensor of memory")
    if device != "cpu" and not (moved and device.partition(":")[0] in _DEVICES):
        raise NoTensor("it is a tensor of another device than the CPU")
    there = files[f"data/{key}"][1]
    unit = 1 if item and storage.name == _UNTYPED else _STORAGES[storage.name]
    item = item or unit
    if count * unit != there:
        raise NoTensor("its bytes are not as many as it says")
    _check_shape(offset, sizes, strides, there // item, item)


def _check_shape(offset: int, sizes: Any, strides: Any, count: int, item: int) -> None:
    """Raise NoTensor for a tensor that has items twice, or items that it has no bytes for."""
    if not isinstance(sizes, tuple) or not isinstance(strides, tuple):
        raise NoTensor("it is not one dense tensor of memory")
    if len(sizes) != len(strides) or len(sizes) > _DIMENSIONS:
        raise NoTensor(f"it has more than {_DIMENSIONS} dimensions")
    if any(type(n) is not int or n < 0 for n in (offset, *sizes, *strides)):
        raise NoTensor("its shape is none")
    items = math.prod(sizes)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if items and (items > count or last >= count):
        raise NoTensor(f"it would have {items * item} bytes, but holds {count * item}")


def _item_bytes(kind: Any) -> int:
    module, _, name = kind.name.partition(" ") if isinstance(kind, _Name) else ("", "", "")
    dtype = dtype_named(name)
    if module != "torch" or dtype is None:
        raise NoTensor("it is not one dense tensor of memory")
    return int(dtype.itemsize)


def dtype_named(name: str) -> torch.dtype | None:
    """The type of torch's numbers with this name, None if there is none."""
    dtype: Any = getattr(torch, name, None) if _NUMBERS.fullmatch(name) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _calls(made: Any, name: str) -> bool:
    return (
        isinstance(made, _Call) and isinstance(made.function, _Name) and made.function.name == name
    )
