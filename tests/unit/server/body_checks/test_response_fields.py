"""Metadata of a response, which are kept with it, and earlier answers that a client sends."""

from typing import Any

import pytest

from llumnix.server.body_checks.response_fields import check_response_fields
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
        check_response_fields(PATH, {"metadata": metadata})
    assert str(refused.value) == sentence and refused.value.field == "metadata"
    check_response_fields("/v1/chat/completions", {"metadata": metadata})  # where it is not kept


def test_what_is_within_them() -> None:
    most = {f"{n:064}": "v" * 512 for n in range(16)}
    for said in ({"metadata": most}, {"metadata": None}, {"metadata": [1]}, {}, [], None):
        check_response_fields(PATH, said)


@pytest.mark.parametrize("content", [[], [{"type": "refusal", "refusal": "no"}]])
@pytest.mark.parametrize("given", [{}, {"id": "msg_1", "status": "completed"}])
def test_an_earlier_answer_without_a_text(content: list[Any], given: dict[str, str]) -> None:
    answer = {"type": "message", "role": "assistant", **given}
    asks = {"role": "user", "content": []}
    for path in (PATH, f"{PATH}/render"):
        with pytest.raises(BadContent, match="must begin with an output_text"):
            check_response_fields(path, {"input": [asks, answer | {"content": content}]})
    text = {"type": "output_text", "text": "yes", "annotations": []}
    check_response_fields(PATH, {"input": [asks, answer | {"content": [text, *content]}]})
    check_response_fields(PATH, {"input": [asks, {"role": "assistant", "content": content}]})
    check_response_fields(PATH, {"input": "text"})
