"""Fields of a body whose texts are binary data, which vLLM makes tensors of."""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.config import ModelConfig

from llumnix.server.body_checks import limits
from llumnix.server.body_checks.base64_text import Base64Text
from llumnix.server.body_checks.media_items import NoItem, check_item
from llumnix.server.body_checks.msgpack_scan import MsgpackScan
from llumnix.server.body_checks.npy_file import PREFIX, check_npy_file
from llumnix.server.body_checks.torch_file import NoTensor, check_torch_file
from llumnix.server.errors import BadContent

_PROMPT = "prompt_embeds"
_EMBEDS = frozenset({_PROMPT, "image_embeds", "audio_embeds", "video_embeds"})
_ITEMS = ("kwargs_data", "mm_metadata")  # of `features`: what a renderer made of images and sounds
# Where clients put what they like, and describe fields instead of filling them.
_ELSEWHERE = limits.FREE | {"tools", "functions"}


@dataclass(frozen=True, slots=True)
class Taken:
    """Of which binary data the server makes something at all."""

    prompt_embeds: bool = False  # --enable-prompt-embeds
    media_embeds: bool = False  # --enable-mm-embeds
    media_items: bool = False  # a model of images or sounds


NOTHING = Taken()


def taken_by(model: ModelConfig) -> Taken:
    """What a server of this model takes."""
    media = model.multimodal_config
    return Taken(
        prompt_embeds=model.enable_prompt_embeds,
        media_embeds=media is not None and media.enable_mm_embeds,
        media_items=model.is_multimodal_model,
    )


@dataclass(slots=True)
class _Found:
    """The texts of a body that are binary data."""

    embeds: list[tuple[str, str]] = field(default_factory=list)  # by the names of their fields
    items: list[tuple[str, str]] = field(default_factory=list)


async def check_binary_fields(said: Any, taken: Taken) -> None:
    """Raise BadContent, or TooMuch, for binary data that is not taken or would cost too much."""
    if type(said) is not dict:
        return
    found = _Found()
    _find_embeds(said, found.embeds, top=True)
    if isinstance(features := said.get("features"), dict):
        found.items = list(_items(features))
    for name, _ in found.embeds:
        _refuse_unless_taken(name, taken)
    if found.items and not taken.media_items:
        name = found.items[0][0]
        raise BadContent(f"{name} is for models that take images or sounds, not for this one", name)
    if len(found.embeds) > limits.EMBEDS:
        name = found.embeds[0][0]
        raise BadContent(f"{name} must have at most {limits.EMBEDS} tensors", name)
    if found.embeds or found.items:
        await asyncio.to_thread(_check, found)


def _refuse_unless_taken(name: str, taken: Taken) -> None:
    is_taken, option = (
        (taken.prompt_embeds, "--enable-prompt-embeds")
        if name == _PROMPT
        else (taken.media_embeds, "--enable-mm-embeds")
    )
    if not is_taken:
        raise BadContent(f"{name} must not be given to this server: it has no {option}", name)


def _find_embeds(part: Any, found: list[tuple[str, str]], top: bool = False) -> None:
    if type(part) is list:
        for inner in part:
            if type(inner) is dict or type(inner) is list:
                _find_embeds(inner, found)
        return
    for name, inner in part.items():
        if type(inner) is str:
            if name in _EMBEDS:
                found.append((name, inner))
            elif name == "data" and (part.get("type") == _PROMPT or _PROMPT in part):
                found.append((_PROMPT, inner))
        elif type(inner) is dict or type(inner) is list:
            if name in _EMBEDS:
                found += [(name, text) for text in _texts(inner)]
            # The input of a tool that was called is no place of these, unlike that of a response.
            elif name not in _ELSEWHERE and (top or name != "input"):
                _find_embeds(inner, found)


def _texts(value: Any) -> Iterator[str]:
    """The texts of a list or an object."""
    values = value.values() if type(value) is dict else value if type(value) is list else ()
    return (text for text in values if type(text) is str)


def _items(features: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _ITEMS:
        kinds = features.get(name)
        for listed in kinds.values() if isinstance(kinds, dict) else ():
            yield from ((name, text) for text in _texts(listed))


def _check(found: _Found) -> None:
    for name, text in found.embeds:
        with _field(name):
            _check_embeds(Base64Text(text), name)
    scan = MsgpackScan()
    for name, text in found.items:
        with _field(name):
            check_item(text, scan)


@contextlib.contextmanager
def _field(name: str) -> Iterator[None]:
    """Say which field it is whose data is refused in here."""
    try:
        yield
    except NoTensor as error:
        what = "a dense tensor, as torch.save writes it"
        raise BadContent(f"{name} must be base64 of {what}: {error}", name) from error
    except NoItem as error:
        raise BadContent(f"{name} must be what a renderer has made: {error}", name) from error
    except ValueError as error:
        raise BadContent(f"{name} must be base64: {error}", name) from error


def _check_embeds(data: Base64Text, name: str) -> None:
    if name != _PROMPT and data.read(0, len(PREFIX)) == PREFIX:
        check_npy_file(data)
    else:
        check_torch_file(data, moved=name == _PROMPT)
