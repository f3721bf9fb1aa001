"""Images, sounds and videos of a request: how many bytes they become when they are decoded.

vLLM bounds an image and a sound each for itself, a video frame by frame, and none of them together:
a few megabytes may become hundreds of gigabytes. They are looked at where vLLM decodes them, so it
does not matter where in a request they were, or whether they were in it or fetched.
"""

import asyncio
import weakref
from collections.abc import Callable
from http import HTTPStatus
from io import BytesIO
from typing import Any

import cv2
import cv2.videoio_registry as videoio
from PIL import Image
from vllm import envs
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    ImageMediaIO,
    MediaConnector,
    MediaIO,
    VideoMediaIO,
)

from llumnix.engine.vllm import compat
from llumnix.engine.vllm.frontend.media_budgets import (
    STILL,
    VIDEO,
    MediaBudget,
    NoRoom,
    media_budget,
)
from llumnix.metrics import REFUSALS

WAITS = 8  # times that one of several parts waits for room
FRAMES = 1_000_000  # of a video, as it says itself
# What clients send. vLLM takes 30 more, of which some hold others, of another size than they say.
IMAGES = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_PIXEL_BYTES = 4  # in Pillow's memory, of most kinds of images
_FRAME_BYTES = 3  # of a pixel in a video
_TILE = (322, 323)  # the tags of a TIFF for the size of its tiles, which may exceed the image's


class _Load:
    """What one file becomes, which is held as long as that is."""

    def __init__(self) -> None:
        self._budget = media_budget.get() or MediaBudget()
        self._taken: list[tuple[str, int]] = []
        self._held = self._waits = 0
        self._ready = 0  # bytes that it holds already, for what is to come

    def take(self, kind: str, size: int) -> None:
        """Raises ValueError if it is too much for the request, NoRoom if it is for now."""
        self._budget.take(kind, size)
        self._taken.append((kind, size))
        self.hold(size)

    def hold(self, size: int) -> None:
        """Hold so much more, or less. Raises NoRoom."""
        room, ready = self._budget.room, min(self._ready, max(size, 0))
        self._ready -= ready
        self._held += size - ready
        try:
            if size > ready:
                room.take(self._budget, size - ready)
            elif size < 0:
                room.give(self._budget, -size)
        except NoRoom:
            self._held -= size - ready
            raise

    async def wait(self, size: int) -> None:
        """Hold so much when there is room. Raises vLLM's error of 503."""
        self._waits += 1
        if self._waits > WAITS:
            raise self.refused()
        try:
            await self._budget.room.wait(self._budget, size)
        except TimeoutError:
            raise self.refused() from None
        self._held += size
        self._ready += size

    def refused(self) -> Exception:
        """What its client is told: too much is decoded."""
        REFUSALS.labels("media_budget").inc()
        text = "this server has too many images, sounds and videos at work; try again soon"
        return compat.failed(text, HTTPStatus.SERVICE_UNAVAILABLE)

    def undo(self) -> int:
        """It has become nothing; how many bytes it has held."""
        for kind, size in self._taken:
            self._budget.give(kind, size)
        self._taken.clear()
        held, self._ready = self._held, 0
        self.hold(-held)
        return held

    def keep(self, decoded: Any) -> Any:
        """It has become this."""
        owner = getattr(decoded, "media", decoded)
        owner = owner[0] if isinstance(owner, tuple) else owner
        room, budget = self._budget.room, self._budget
        spare, self._ready = self._ready, 0
        self.hold(-spare)
        try:
            weakref.finalize(owner, room.give, budget, self._held).atexit = False
        except TypeError:  # of another loader's kind, whose end nobody can hear of
            room.give(budget, self._held)
        return decoded


class BoundedConnector(MediaConnector):
    """vLLM's loader of media, with a look at each before it is decoded."""

    def load_from_url(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """The media that are at this URL, or in it. Raises ValueError if they are too large."""
        load = _Load()
        try:
            return load.keep(super().load_from_url(url, _bounded(media_io, load), **options))
        except NoRoom:
            load.undo()
            raise load.refused() from None
        except BaseException:
            load.undo()
            raise

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """The same, decoded in a thread, and when there is room. Raises vLLM's error of 503."""
        load, data = _Load(), None
        _bounded(media_io, load)
        while True:
            try:
                if data is not None:  # it need not be fetched again
                    return load.keep(await asyncio.to_thread(media_io.load_bytes, data))
                return load.keep(await super().load_from_url_async(url, media_io, **options))
            except NoRoom as full:
                data, size = full.data, full.size + load.undo()
            except BaseException:
                load.undo()
                raise
            await load.wait(size)


class NoConnector(MediaConnector):
    """For a model of texts alone: vLLM's routes of embeddings would fetch what it can't take."""

    def load_from_url(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """Raises ValueError."""
        raise ValueError("this model takes texts alone: no images, sounds and videos")

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """Raises ValueError."""
        self.load_from_url(url, media_io)


def bound_media(any_at_all: bool = True) -> None:
    """Have vLLM's frontend load media so, unless its operator has chosen another loader.

    `any_at_all`: whether the model takes media.
    """
    MEDIA_CONNECTOR_REGISTRY.register("http")(BoundedConnector if any_at_all else NoConnector)


def _bounded(media_io: MediaIO[Any], load: _Load) -> MediaIO[Any]:
    """The decoder, which is made for one file, with a look at the file and at what has become."""
    if isinstance(media_io, VideoMediaIO):  # its frames may be images
        _bound(media_io.image_io, lambda data: load.take(STILL, _image_bytes(data)), part=True)
        _bound(media_io, lambda data: load.take(VIDEO, _video_bytes(media_io, data)))
    elif isinstance(media_io, ImageMediaIO):
        _bound(media_io, lambda data: load.take(STILL, _image_bytes(data)))
    else:  # a sound, of which vLLM bounds each

        def see(sound: Any) -> None:
            load.hold(-envs.VLLM_MAX_AUDIO_DECODE_BYTES)
            load.take(STILL, sound[0].nbytes)

        _bound(media_io, lambda data: load.hold(envs.VLLM_MAX_AUDIO_DECODE_BYTES), see)
    return media_io


def _bound(
    media_io: MediaIO[Any],
    look: Callable[[bytes], None],
    see: Callable[[Any], None] = lambda decoded: None,
    part: bool = False,
) -> None:
    decode = media_io.load_bytes

    def load_bytes(data: bytes) -> Any:
        try:
            look(data)
            decoded = decode(data)
            see(decoded)
        except NoRoom as full:
            full.data = None if part else data
            raise
        except (ValueError, ImportError, MemoryError):
            raise
        except Exception as error:  # of many libraries; vLLM would take most for its own: 500
            raise ValueError(f"a file of the request can't be decoded: {error}") from error
        return decoded

    vars(media_io)["load_bytes"] = load_bytes  # which its other ways of loading call


def _image_bytes(data: bytes) -> int:
    Image.init()
    known = [kind for kind in IMAGES if kind in Image.OPEN]
    try:
        image = Image.open(BytesIO(data), formats=known)
        (width, height), tile = image.size, (0, 0)
        if image.format == "TIFF":
            tags = image.getexif()
            tile = (int(tags.get(_TILE[0], 0)), int(tags.get(_TILE[1], 0)))
    except Exception as error:
        kinds = ", ".join(known)
        raise ValueError(f"an image must be one of {kinds} that can be read: {error}") from error
    return max(width, tile[0]) * max(height, tile[1]) * _PIXEL_BYTES


def _video_bytes(media_io: VideoMediaIO, data: bytes) -> int:
    # It is not released by its own method: OpenCV lets go of the bytes there without Python's lock.
    stream: Any = BytesIO(data)
    video = cv2.VideoCapture(stream, _reader(), [])
    if not video.isOpened():
        return 0  # vLLM says so, or has another reader
    asked = (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
    frames, width, height = (max(0, int(video.get(what))) for what in asked)
    rate = max(0.0, video.get(cv2.CAP_PROP_FPS))
    del video
    if frames > FRAMES:  # of which vLLM makes a list
        raise ValueError(f"a video must have at most {FRAMES} frames")
    return compat.sampled_frames(media_io, frames, rate) * width * height * _FRAME_BYTES


def _reader() -> int:
    """The library behind OpenCV that reads videos out of memory, as vLLM chooses it."""
    known = (b for b in videoio.getStreamBufferedBackends() if videoio.hasBackend(b))
    return next((int(b) for b in known if videoio.isBackendBuiltIn(b)), cv2.CAP_ANY)
