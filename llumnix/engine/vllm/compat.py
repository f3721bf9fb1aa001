"""All differences between the supported versions of vLLM, and the seams that have no plug-in.

Accepted: vLLM 0.26 to 0.33. Whatever moved between them is looked up here by its old and new name.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from http import HTTPStatus
from types import ModuleType
from typing import Any

import orjson
import vllm
from vllm.v1.engine.core_client import EngineCoreClient

OLDEST, NEWEST = (0, 26), (0, 33)

_SERVER_MODULES = (
    "vllm.entrypoints.launchers.app",  # 0.32
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.common.cli_args",  # 0.33
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",  # 0.26
    "vllm.entrypoints.openai.api_server",
)


def supported(version: str = vllm.__version__) -> bool:
    """Whether this version of vLLM is one that llumnix was written for."""
    numbers = version.split(".")[:2]
    if not all(n.isdigit() for n in numbers):
        return True  # a build from source: let it try
    major, minor = (int(n) for n in numbers)
    return OLDEST <= (major, minor) <= NEWEST


def server_symbol(name: str) -> Any:
    """A function of vLLM's OpenAI server, wherever this version keeps it.

    Raises ImportError if no known module has it.
    """
    for module in _SERVER_MODULES:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"vLLM {vllm.__version__} has no {name} where llumnix looks for it")


@contextlib.contextmanager
def engine_core_client(client: EngineCoreClient) -> Iterator[None]:
    """While this is open, an AsyncLLM that is made takes `client` instead of starting an engine.

    AsyncLLM calls this static method in its constructor and has no argument for a client of
    one's own; it is the same in all supported versions.
    """
    original = EngineCoreClient.__dict__["make_async_mp_client"]
    EngineCoreClient.make_async_mp_client = staticmethod(lambda *a, **k: client)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = original


def add_utility(name: str, function: Callable[..., Any]) -> None:
    """Have this process's engine core answer one more utility call, with itself as first argument.

    vLLM calls any method of the engine core by its name, and has no place to add one.
    """
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, name, function)


def lose_no_request_at_shutdown() -> None:
    """Have an engine core that is asked to end by a signal say nothing about its requests.

    vLLM tells their clients that they are aborted, which is right where no other engine could go on
    with them; what is open when the process ends is resumed. There is no setting for it. In older
    versions the core says nothing anyway.
    """
    from vllm.v1.engine.core import EngineCoreProc as Core

    send = getattr(Core, "_send_abort_outputs_to_client", None)
    if send is None or hasattr(send, "__wrapped__"):
        return

    @functools.wraps(send)
    def unless_it_ends(self: Any, request_ids: list[str], client: int) -> None:
        if self.shutdown_state.name == "RUNNING":  # it is a client that wants them ended
            send(self, request_ids, client)

    Core._send_abort_outputs_to_client = unless_it_ends


def before_death(tell: Callable[[Any], None]) -> None:
    """Have an engine core call `tell(core)` while it handles the exception that ends it, once.

    vLLM has no hook for it. A version that says it by another name than `_send_engine_dead` leaves
    no word, and its death is one of those that nobody is blamed for.
    """
    from vllm.v1.engine.core import EngineCoreProc as Core

    send = getattr(Core, "_send_engine_dead", None)
    if send is None or hasattr(send, "__wrapped__"):
        return

    @functools.wraps(send)
    def told(self: Any) -> None:
        tell(self)
        send(self)

    Core._send_engine_dead = told


def around_update_states(wrapper: Callable[[ModuleType, Callable[..., Any]], Any]) -> None:
    """Put `wrapper(module, original)` in place of model runner V1's `_update_states`, once.

    V1 makes the state of a new request there, always without outputs, and has no hook for it; V2 is
    told by the scheduler. Raises ImportError if a version makes it elsewhere.
    """
    from vllm.v1.worker import gpu_model_runner as module

    runner = module.GPUModelRunner
    if not hasattr(module, "CachedRequestState") or not hasattr(runner, "_update_states"):
        raise ImportError(f"vLLM {vllm.__version__} makes requests' states elsewhere")
    if not hasattr(runner._update_states, "__wrapped__"):
        runner._update_states = wrapper(module, runner._update_states)


def stream_handlers(state: Any) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """For each route that streams tokens: how to parse a request, and vLLM's handler of it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    chat = getattr(state, "openai_serving_chat", None)
    completion = getattr(state, "openai_serving_completion", None)
    handlers = {}
    if chat is not None:
        handlers["/v1/chat/completions"] = (
            ChatCompletionRequest.model_validate,
            chat.create_chat_completion,
        )
    if completion is not None:
        handlers["/v1/completions"] = (
            CompletionRequest.model_validate,
            completion.create_completion,
        )
    return handlers


def client_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises when the client has asked for something that can't be."""
    try:
        from vllm.exceptions import VLLMClientError
    except ImportError:  # before 0.32
        return (ValueError, TypeError)
    return (ValueError, TypeError, VLLMClientError)


def failed(message: str, status: HTTPStatus) -> Exception:
    """The exception that vLLM's server answers with this status and the message.

    Before 0.32 the server knows no such exception, and answers 500 to any but a 400.
    """
    if status == HTTPStatus.BAD_REQUEST:
        from vllm.exceptions import VLLMValidationError

        return VLLMValidationError(message)  # type: ignore[no-any-return]
    try:
        from vllm.exceptions import GracefulHTTPError
    except ImportError:
        return RuntimeError(message)
    return GracefulHTTPError(message, status)  # type: ignore[no-any-return]


def answer_quickly() -> None:
    """Spare the event loop most of what logprobs cost it; both have no setting in vLLM.

    vLLM decodes each token of each logprob anew, ten microseconds a time. And its answers are
    encoded by Python's own JSON, which holds the interpreter for 0.3 s for one of 9 MB, eight times
    as long as orjson does.
    """
    from starlette.responses import JSONResponse
    from vllm.v1.engine import logprobs

    convert = getattr(logprobs, "convert_ids_list_to_tokens", None)
    if convert is not None and not hasattr(convert, "__wrapped__"):
        logprobs.convert_ids_list_to_tokens = _remembering(convert)
    render = JSONResponse.render
    if not hasattr(render, "__wrapped__"):

        @functools.wraps(render)
        def quickly(self: JSONResponse, content: Any) -> bytes:
            try:
                return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)
            except TypeError:  # such as an integer of more than 64 bits
                return render(self, content)

        JSONResponse.render = quickly  # type: ignore[method-assign]


def _remembering(convert: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """A function that gives the text of each token, and remembers it."""
    known: weakref.WeakKeyDictionary[Any, dict[int, str]] = weakref.WeakKeyDictionary()

    @functools.wraps(convert)
    def remembered(tokenizer: Any, token_ids: list[int]) -> list[str]:
        texts = known.setdefault(tokenizer, {})
        if new := [i for i in dict.fromkeys(token_ids) if i not in texts]:
            texts.update(zip(new, convert(tokenizer, new), strict=True))
        return [texts[i] for i in token_ids]

    return remembered


def skip_grammar_validation(params: Any) -> None:
    """Have vLLM's frontend take the grammar of these parameters as validated.

    It validates on its event loop, for which large schemas are too much, and has no place to do it
    elsewhere. Versions that name the method differently validate once more.
    """
    params._validate_structured_outputs = _nothing


def _nothing(*arguments: Any) -> None:
    """What is left to do for something that is done."""


def media_fields() -> dict[str, type]:
    """The classes that say how tensors of images are batched, by the names that requests have."""
    from vllm.v1 import serial_utils

    return {name: field for field, name in serial_utils.MMF_CLASS_TO_FACTORY.items()}


def media_element_keys() -> set[str]:
    """What a request says of each tensor of an image: in older versions its modality, too."""
    from vllm.multimodal.inputs import MultiModalFieldElem

    return {field.name for field in dataclasses.fields(MultiModalFieldElem)}


def sampled_frames(media_io: Any, frames: int, rate: float) -> int:
    """How many frames vLLM would take of a video that has so many, and so many in a second.

    Its loaders have a method that tells. Where one has not, it is as many as are asked for, or all.
    """
    loader, options = media_io.video_loader, dict(media_io.kwargs)
    try:
        from vllm.multimodal import video_decoders as kinds

        known = inspect.signature(loader.load_bytes).parameters
        fps, longest = (options.pop(n, known[n].default) for n in ("fps", "max_duration"))
        for name in ("backend", "frame_recovery", "num_frames"):
            options.pop(name, None)
        source = kinds.VideoSourceMetadata(frames, rate, frames / rate if rate else 0)
        target = kinds.VideoTargetMetadata(media_io.num_frames, fps, longest)
        return len(loader.compute_frames_index_to_sample(source, target, **options))
    except Exception:
        asked = media_io.num_frames
        return min(frames, asked) if isinstance(asked, int) and asked > 0 else frames
