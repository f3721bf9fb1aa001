"""The table in docs/resume.md: it is complete, and each row names a test that there is."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from llumnix.engine.vllm import scheduler
from llumnix.engine.vllm.resume import with_generated
from tests.kit.requests import core_request

TESTS = Path(__file__).parents[2]
PAGE = TESTS.parent / "docs" / "resume.md"
TEST = re.compile(r"`([\w/]+)\.py::(\w+)(?:\[([^`]+)\])?`")
STATUS = re.compile(r"(exact|exact in distribution|pinned|not tested here)\b")
FEATURES = (
    *("echo", "tool parsers", "reasoning parsers", "beam search", "logits processors", "LoRA"),
    *("priority", "cache_salt", "prefix caching off", "chunked prefill", "speculative decoding"),
    *("asynchronous scheduling", "multimodal input", "streaming input", "pooling"),
    *("prompt embeds", "JSON schema", "regex", "grammar", "structural tag", "chat"),
)


def rows() -> list[tuple[str, str, str]]:
    found = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ") and "a move is" not in line:
            what, status, shown = (cell.strip() for cell in line.strip("|").split(" | "))
            found.append((what, status, shown))
    return found


def test_the_table_names_every_sampling_parameter() -> None:
    named = {name for what, _, _ in rows() for name in re.findall(r"`(\w+)`", what)}
    missing = sorted(set(SamplingParams.__struct_fields__) - named)
    assert not missing, f"docs/resume.md does not say what a move does to {', '.join(missing)}"


def test_the_table_names_every_feature() -> None:
    named = "\n".join(what for what, _, _ in rows())
    missing = [feature for feature in FEATURES if feature not in named]
    assert not missing, f"docs/resume.md does not say what a move does to {', '.join(missing)}"


@pytest.mark.parametrize("what, status, shown", rows(), ids=[what for what, _, _ in rows()])
def test_a_row_names_a_test_that_there_is(what: str, status: str, shown: str) -> None:
    assert STATUS.match(status), f"{what}: {status}"
    named = TEST.findall(shown)
    assert named, f"no test shows what a move does to {what}"
    for file, function, case in named:
        module: Any = importlib.import_module("tests." + file.replace("/", "."))
        test = getattr(module, function, None)
        assert test is not None, f"there is no {function} in {file}"
        cases = [case for m in getattr(test, "pytestmark", ()) for case in _cases(m)]
        assert not case or case in cases, f"{function} has no case {case}"


def _cases(mark: Any) -> list[str]:
    return [str(case) for case in mark.args[1]] if mark.name == "parametrize" else []


# ---- what needs no engine ----


def _request() -> EngineCoreRequest:
    request = core_request("r", [1, 2, 3])
    request.sampling_params = SamplingParams(
        prompt_logprobs=2, seed=5, extra_args={"own": 1}, trace_decode_token_ids=[7, 8, 9]
    )
    request.sampling_params.prompt_logprob_token_ids = [[1], [2]]
    request.sampling_params.prompt_logprob_start = 1
    request.sampling_params.routed_experts_prompt_start = 1
    request.sampling_params.watermarking = True
    return request


def _params(request: EngineCoreRequest) -> SamplingParams:
    assert request.sampling_params is not None
    return request.sampling_params


def test_what_was_delivered_is_not_asked_for_again() -> None:
    params = _params(with_generated(_request(), [7]))
    assert params.prompt_logprobs is None
    assert params.prompt_logprob_token_ids is None and params.prompt_logprob_start is None
    assert _params(_request()).skip_reading_prefix_cache and not params.skip_reading_prefix_cache
    wished = core_request("r", [1, 2, 3])
    wished.sampling_params = SamplingParams(skip_reading_prefix_cache=True)
    assert _params(with_generated(wished, [7])).skip_reading_prefix_cache, "by the client"


def test_the_parameters_of_a_resume_are_a_copy() -> None:
    request = _request()
    resumed = with_generated(request, [7])
    assert _params(request).prompt_logprobs == 2
    assert _params(request).extra_args == {"own": 1}
    assert _params(resumed) is not _params(request)
    assert with_generated(request, []) is request, "nothing was generated"


def test_no_client_gives_a_request_outputs() -> None:
    request = _request()
    _params(request).extra_args = {"llumnix_generated": 1.5}
    for generated in ([], [7]):
        with pytest.raises(ValueError, match="extra_args may not have 'llumnix_generated'"):
            with_generated(request, generated)


def test_a_seed_that_no_engine_holds_is_refused() -> None:
    request = _request()
    for seed in (2**63, -(2**63) - 1):  # the first of which n=2 makes of the largest
        _params(request).seed = seed
        with pytest.raises(ValueError, match="seed"):
            with_generated(request, [])
    _params(request).seed = 2**63 - 1
    assert with_generated(request, []) is request


def test_what_a_resume_carries() -> None:
    """Everything but what was delivered: parameters, and whatever else belongs to the request."""
    request = _request()
    request.mm_features = [SimpleNamespace()]  # type: ignore[list-item]
    request.cache_salt, request.priority = "salt", 3
    resumed = with_generated(request, [7])
    same = set(EngineCoreRequest.__struct_fields__) - {"sampling_params"}
    assert all(getattr(resumed, name) == getattr(request, name) for name in same)
    delivered = {name for name in SamplingParams.__struct_fields__ if name.startswith("prompt_")}
    delivered.add("skip_reading_prefix_cache")  # as it was to be computed for the prompt_logprobs
    for name in set(SamplingParams.__struct_fields__) - delivered - {"extra_args"}:
        assert getattr(_params(resumed), name) == getattr(_params(request), name), name
    extra = _params(resumed).extra_args
    assert extra is not None and extra["own"] == 1


def test_an_operators_own_scheduler_is_left_alone() -> None:
    def config(cls: Any = None, extension: str = "") -> Any:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(scheduler_cls=cls, async_scheduling=False),
            parallel_config=SimpleNamespace(worker_extension_cls=extension),
        )

    stock, own, extended = config(), config("somebody.Else"), config(extension="somebody.Else")
    assert scheduler.install(stock) and scheduler.installed(stock)
    for other in (own, extended):
        assert not scheduler.install(other) and not scheduler.installed(other)
