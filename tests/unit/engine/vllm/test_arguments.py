"""Options of vLLM's server that would do nothing are named, or refused."""

import logging

import pytest

from llumnix.config import ConfigError
from llumnix.engine.vllm.arguments import check_ignored, make_parser


def check(*options: str) -> None:
    parser = make_parser("test")
    check_ignored(parser, parser.parse_args(["--model", "m", *options]))


@pytest.mark.parametrize(
    "options",
    [
        ("--headless",),
        ("--grpc",),
        ("--enable-ssl-refresh",),
        ("--data-parallel-size", "2"),
    ],
)
def test_what_somebody_would_count_on_is_refused(options: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{options[0]} does nothing here: "):
        check(*options)


def test_what_is_harmless_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llumnix"), "propagate", True)
    with caplog.at_level(logging.WARNING, "llumnix"):
        check("--api-server-count", "1")
        assert not caplog.messages
        check("--uvicorn-log-level", "debug")
    assert caplog.messages == ["--uvicorn-log-level does nothing here: the server is not vLLM's"]
