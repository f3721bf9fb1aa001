"""The metadata of a response, which are kept with it."""

from typing import Any

import pytest

from llumnix.server.body_checks.response_fields import check_metadata
from llumnix.server.errors import BadContent

PATH = "/v1/responses"


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({str(n): "v" for n in range(17)}, "metadata must have at most 16 pairs"),
        ({"k" * 65: "v"}, "metadata must have keys of at most 64 characters"),
        ({"k": "v" * 513}, "metadata must have values of at most 512 characters"),
    ],
)
def test_what_is_beyond_openais_limits(metadata: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadContent) as refused:
        check_metadata(PATH, {"metadata": metadata})
    assert str(refused.value) == sentence and refused.value.field == "metadata"
    check_metadata("/v1/chat/completions", {"metadata": metadata})  # where it is not kept


def test_what_is_within_them() -> None:
    most = {f"{n:064}": "v" * 512 for n in range(16)}
    for said in ({"metadata": most}, {"metadata": None}, {"metadata": [1]}, {}, [], None):
        check_metadata(PATH, said)
