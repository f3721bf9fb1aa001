"""A file of torch.save is what it says: no more memory than its bytes, and nothing to run."""

import io
import struct
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.server.body_checks.base64_text import Base64Text
from llumnix.server.body_checks.torch_file import NoTensor, check_torch_file
from tests.kit.tensors import rezipped, saved, text, with_pickle

TENSORS = {
    **{str(kind): torch.zeros(3, 5).to(kind) for kind in (torch.float16, torch.bfloat16)},
    **{str(kind): torch.zeros(3, 5).to(kind) for kind in (torch.float64, torch.float8_e5m2)},
    **{str(kind): torch.zeros(3, 5, dtype=kind) for kind in (torch.int8, torch.uint16)},
    "complex": torch.zeros(3, 5, dtype=torch.complex64),
    "boolean": torch.zeros(3, 5, dtype=torch.bool),
    "no dimension": torch.tensor(1.0),
    "three dimensions": torch.zeros(1, 3, 5),
    "no rows": torch.zeros(0, 5),
    "a part of another": torch.zeros(8, 9)[2:4, 1:],
    "transposed": torch.zeros(3, 5).T,
    "a parameter": torch.nn.Parameter(torch.zeros(3, 5)),
    "large": torch.zeros(300, 576),
}
PLAIN = saved(torch.zeros(2, 3))


def check(data: bytes, moved: bool = True) -> None:
    check_torch_file(Base64Text(text(data)), moved)


@pytest.mark.parametrize("name", TENSORS)
def test_plain_tensors_pass(name: str) -> None:
    data = saved(TENSORS[name])
    check(data)
    check(rezipped(data))
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert loaded.shape == TENSORS[name].shape


DEFLATED = with_pickle(b"\x80\x02](" + b"N" * 400_000 + b"e.")
HOSTILE = {
    "stride 0": saved(torch.zeros(1, dtype=torch.float16).expand(1_000_000, 576)),
    "strides that overlap": saved(torch.zeros(1000).as_strided((500, 500), (1, 1))),
    "sparse": saved(torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (3, 5))),
    "sparse rows": saved(torch.zeros(3, 5).to_sparse_csr()),
    "nested": saved(torch.nested.nested_tensor([torch.zeros(2, 3)])),
    "on no device": saved(torch.zeros(2, 3, device="meta")),
    "quantised": saved(torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.quint8)),
    "conjugated": saved(torch.zeros(2, 3, dtype=torch.complex64).conj()),
    "a list": saved([1, 2]),
    "a dictionary": saved({"a": torch.zeros(1)}),
    "of the old format": saved(torch.zeros(2, 3), old=True),
    "deflated": rezipped(PLAIN, method=zipfile.ZIP_DEFLATED),
    "a bomb": rezipped(DEFLATED, method=zipfile.ZIP_DEFLATED),
    "a long pickle": DEFLATED,
    "a call": with_pickle(b"\x80\x02cbuiltins\nbytearray\n(J\x00\x00\x00\x7ftR."),
    "lists of lists": with_pickle(b"\x80\x02]q\x00" + b"(h\x00h\x00e" * 20 + b"."),
    "a pickle without end": with_pickle(b"\x80\x02"),
    "an empty pickle": with_pickle(b""),
    "an empty stack": with_pickle(b"\x80\x02."),
    "a tuple of nothing": with_pickle(b"\x80\x02\x87."),
    "other files": rezipped(PLAIN, more=("archive/constants.pkl",)),
    "another folder": rezipped(PLAIN, more=("Archive/data/1",)),
    "something behind it": PLAIN + b"x",
    "something before it": b"x" * 300 + PLAIN,
    "half of it": PLAIN[: len(PLAIN) // 2],
    "nothing": b"",
    "no zip": b"x" * 1000,
    "fewer bytes than it says": rezipped(
        PLAIN, lambda name, old: old[:4] if name.endswith("data/0") else old
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_loaded(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(NoTensor):
        check(HOSTILE[name])
    assert time.thread_time() - began < 0.3  # 0.2 ms, on a machine of one's own


def test_a_tensor_of_a_device() -> None:
    data = PLAIN.replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00hpu")
    check(data, moved=True)
    with pytest.raises(NoTensor, match="another device"):
        check(data, moved=False)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_passes_loads_to_its_own_size(data: st.DataObject) -> None:
    """With bytes changed anywhere but in the numbers: either refused, or of the size it has."""
    broken = bytearray(PLAIN)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(broken) - 1))
        broken[at] = data.draw(st.integers(0, 255))
    try:
        check(bytes(broken))
    except NoTensor:
        return
    try:
        tensor = torch.load(io.BytesIO(bytes(broken)), weights_only=True)
    except Exception:
        return  # as for a wrong checksum; vLLM answers 400
    assert tensor.layout is torch.strided and tensor.numel() * tensor.element_size() <= 24


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000))
def test_any_pickle_is_read(pickle: bytes) -> None:
    for beginning in (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(", b"\x80\x02(", b""):
        with pytest.raises(NoTensor):
            check(with_pickle(beginning + pickle))


def test_two_ends_of_a_zip_must_agree() -> None:
    """Of which one loader may take the first, another the second."""
    at = len(PLAIN) - 22 - 20 - 56
    assert PLAIN[at : at + 4] == b"PK\6\6"
    (begins,) = struct.unpack_from("<Q", PLAIN, at + 48)
    forged = PLAIN[: at + 48] + struct.pack("<Q", begins - 46) + PLAIN[at + 56 :]
    with pytest.raises(NoTensor):
        check(forged)
