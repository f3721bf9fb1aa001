"""What a request would have to wait for is compiled before there are any."""

import sys
from argparse import Namespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from llumnix.engine.vllm.processes.compiled_code import compile_ahead


class Core:
    """An engine core with one worker, in this process."""

    def __init__(self) -> None:
        model = Namespace(get_vocab_size=lambda: 1000)
        self.worker = Namespace(model_config=model, device=torch.device("cpu"))
        self.model_executor = self

    def collective_rpc(self, function: Any) -> None:
        function(self.worker)


def gathered(tokens: int) -> None:
    Sampler.gather_logprobs(torch.zeros(tokens, 1000), 1, torch.zeros(tokens, dtype=torch.int64))


@pytest.mark.slow
def test_no_request_is_the_first_to_ask_for_logprobs() -> None:
    torch.compiler.reset()
    compile_ahead(Core())
    with torch.compiler.set_stance("fail_on_recompile"), torch.inference_mode():
        for tokens in 1, 2, 3, 17:
            gathered(tokens)


def test_where_it_cannot_be_compiled_it_is_computed_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Sampler, "gather_logprobs", fail)
    with torch._dynamo.config.patch(suppress_errors=False):
        compile_ahead(Core())
        assert torch._dynamo.config.suppress_errors
    assert "computed without" in caplog.text


def test_a_modelled_device_has_nothing_to_compile() -> None:
    class Modelled:
        def collective_rpc(self, function: Any) -> None:
            raise NotImplementedError

    compile_ahead(Namespace(model_executor=Modelled()))


def test_an_engine_whose_kernels_cannot_be_compiled_starts_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "llumnix.engine.vllm.kv.block_copy", None)
    core = Core()
    core.worker.device = torch.device("cuda")
    with torch._dynamo.config.patch(suppress_errors=False):
        compile_ahead(core)
    assert "copies KV blocks can't be compiled" in caplog.text
