"""What is done to a request's grammar in an engine, whether it is compiled by then or not."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.v1.structured_output.backend_types import StructuredOutputGrammar


def changed(
    grammar: Any, change: Callable[[StructuredOutputGrammar], StructuredOutputGrammar]
) -> Any:
    """What a change makes of a grammar, which may still be compiling: then it is a future, too."""
    if not isinstance(grammar, Future):
        return change(grammar)
    made: Future[StructuredOutputGrammar] = Future()

    def when_compiled(done: "Future[StructuredOutputGrammar]") -> None:
        try:
            made.set_result(change(done.result()))
        except Exception as error:
            made.set_exception(error)

    grammar.add_done_callback(when_compiled)
    return made
