"""What vLLM's server makes of a failure that it is handed: its status and its sentence."""

from http import HTTPStatus

import pytest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from llumnix.engine.vllm.compat import failed

STATUSES = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
)


@pytest.mark.parametrize("status", STATUSES)
def test_a_failure_is_answered_with_its_status(status: HTTPStatus) -> None:
    """A client tries again what was answered with 503, and should not what has killed engines."""
    error = create_error_response(failed("request r is given up", status)).error
    assert (error.code, error.message) == (status, "request r is given up")
