"""A caller's text makes no line of its own in a log, and tells a terminal nothing."""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import orjson
import pytest

from llumnix import log_lines
from llumnix.entrypoints import ctl
from llumnix.log_lines import in_json, one_line

FORGED = "r1\n2026-11-30 14:00:00,000 ERROR forged\r\x1b]0;title\x07\x9b31m\u2028\u202e"
WRITTEN = r"r1\n2026-11-30 14:00:00,000 ERROR forged\r\x1b]0;title\x07\x9b31m\u2028\u202e"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a node writes."""
    logger = logging.getLogger("llumnix")
    before = logger.handlers[:], logger.level, logger.propagate, logging.getLogRecordFactory()
    log_lines.to_stderr()
    (handler,) = logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    stream = io.StringIO()
    handler.setStream(stream)
    yield stream
    logger.handlers[:], logger.level, logger.propagate = before[:3]
    logging.setLogRecordFactory(before[3])


def test_a_message_is_one_line(log: io.StringIO) -> None:
    logging.getLogger("llumnix.dataplane.client").error("request %s ended: %s", FORGED, "é ✓")
    (line,) = log.getvalue().splitlines()
    assert line.endswith(f"ERROR request {WRITTEN} ended: é ✓")


def test_a_traceback_keeps_its_lines_and_none_is_a_message(log: io.StringIO) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("llumnix").exception("it failed")
    first, *rest = log.getvalue().split("\n")[:-1]
    assert first.endswith("ERROR it failed") and rest[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in rest)
    assert rest[-1].endswith(r"ERROR forged\r\x1b]0;title\x07\x9b31m\u2028\u202e")


BIG = "m\n" * 500_000


def test_a_librarys_message_and_an_errors_text_are_cut(log: io.StringIO) -> None:
    library = logging.getLogger("vllm.llumnix_test")
    library.handlers[:], library.propagate = logging.getLogger("llumnix").handlers[:], False
    library.setLevel(logging.INFO)
    library.error("Error with model %s", BIG)
    first = log.getvalue()
    assert first.endswith("(1000017 characters)\n") and first.count("\n") == 1
    assert len(first) < 5_000
    library.info("config %s", "x" * 10_000)
    assert len(log.getvalue()) > 10_000, "what is told at start is longer"
    for logger in (library, logging.getLogger("llumnix.server")):
        before = len(log.getvalue())
        try:
            try:
                raise KeyError(BIG)
            except KeyError as error:
                raise RuntimeError(BIG) from error
        except RuntimeError:
            logger.exception("it failed")
        added = log.getvalue()[before:]
        assert "in test_a_librarys_message" in added and "RuntimeError: m" in added
        assert len(added) < 10_000


def test_a_refusal_of_vllms_routes_is_one_line(log: io.StringIO) -> None:
    from vllm.exceptions import VLLMValidationError

    library = logging.getLogger("vllm.entrypoints.anthropic.api_router")
    handlers, propagate = library.handlers[:], library.propagate
    library.handlers[:], library.propagate = logging.getLogger("llumnix").handlers[:], False
    try:
        for error in (ValueError(BIG), VLLMValidationError("too long"), RuntimeError("a bug")):
            before = len(log.getvalue())
            try:
                raise error
            except Exception as caught:
                library.exception("Error in count_tokens: %s", caught)
            added = log.getvalue()[before:]
            if isinstance(error, RuntimeError):
                assert "  Traceback (most recent call last):" in added
            else:
                assert added.count("\n") == 1 and len(added) < 700
                assert f"({type(error).__name__} at " in added and "test_log_lines.py:" in added
    finally:
        library.handlers[:], library.propagate = handlers, propagate


def test_what_requests_bring_about_again_and_again_has_one_traceback(log: io.StringIO) -> None:
    logger = logging.getLogger("llumnix.server.asgi")

    def fail(kind: type[Exception]) -> str:
        before = len(log.getvalue())
        try:
            raise kind("of request 7")
        except Exception:
            logger.exception("a route failed")
        return log.getvalue()[before:]

    assert fail(KeyError).count("Traceback") == 1
    for _ in range(3):
        told = fail(KeyError)
        assert told.count("\n") == 1 and "of request 7" in told
        assert "(KeyError at " in told and "test_log_lines.py:" in told
    assert fail(IndexError).count("Traceback") == 1, "another kind"
    other = logging.getLogger("llumnix.dataplane")
    for _ in range(2):
        before = len(log.getvalue())
        try:
            raise KeyError
        except KeyError:
            other.exception("no request's doing")
        assert "Traceback" in log.getvalue()[before:]


def test_vllm_builds_on_it_in_an_engines_processes_too() -> None:
    """Only line breaks are left to its formatter, which puts its own prefix before each line."""
    program = (
        "import os; os.environ['LLUMNIX_PARENT'] = str(os.getppid())\n"
        "import llumnix.engine.vllm.processes.forkserver_first\n"
        "from vllm.logger import init_logger\n"
        f"init_logger('vllm.x').error('request %s', {FORGED!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", *sys.path])}
    environment |= {"VLLM_LOGGING_STREAM": "ext://sys.stdout", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    said = done.stdout.decode() + done.stderr.decode()
    assert r"\x1b]0;title\x07" in said and "\x1b" not in said and "\x9b" not in said


def test_what_an_operator_is_shown() -> None:
    rows = [{"id": FORGED, "tokens": 3}]
    assert ctl.table(rows).split("\n")[1].split("  ")[0] == WRITTEN
    text = in_json(orjson.dumps(rows).decode())
    assert orjson.loads(text) == rows, "a program gets it as it is"
    assert one_line(text) == text
