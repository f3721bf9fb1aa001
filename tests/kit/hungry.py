"""A compiler of grammars that takes memory without end, in the process in which they are tried."""

import pickle
from typing import Any

from vllm.config import VllmConfig
from vllm.sampling_params import StructuredOutputsParams

from llumnix.engine.vllm.grammars import trial

FINE = trial.Verdict({"choice": None})


class Hungry:
    """Stands for vLLM's configuration, pickled, and puts the compiler in place when it is read."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = pickle.dumps(config)

    def __reduce__(self) -> tuple[Any, ...]:
        return _read, (self._config,)


def _read(config: bytes) -> Any:
    trial.Compiler.try_out = _try_out  # type: ignore[method-assign]
    return pickle.loads(config)


def _try_out(self: Any, params: StructuredOutputsParams) -> trial.Verdict:
    if params.regex == "bad_alloc":
        raise RuntimeError("std::bad_alloc")  # as xgrammar says it
    held = []
    while params.regex == "hungry":
        held.append(bytearray(2**24))
    return FINE
