"""Images, sounds and videos of a request: how many bytes they become when they are decoded.

vLLM bounds an image and a sound each for itself, a video frame by frame, and none of them together:
a few megabytes may become hundreds of gigabytes. They are looked at where vLLM decodes them, so it
does not matter where in a request they were, or whether they were in it or fetched.
"""

import threading
from collections.abc import Callable
from contextvars import ContextVar
from io import BytesIO
from typing import Any

import cv2
import cv2.videoio_registry as videoio
from PIL import Image
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    ImageMediaIO,
    MediaConnector,
    MediaIO,
    VideoMediaIO,
)

from llumnix.engine.vllm import compat
from llumnix.metrics import REFUSALS

STILL_BYTES = 2**30  # of all images and sounds of a request: six of the largest images of vLLM's
FRAMES = 1_000_000  # of a video, as it says itself
VIDEO_BYTES = 6 * 2**30  # of all its videos: 768 frames of 1080 lines, the most that a model asks
# What clients send. vLLM takes 30 more, of which some hold others, of another size than they say.
IMAGES = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_PIXEL_BYTES = 4  # in Pillow's memory, of most kinds of images
_FRAME_BYTES = 3  # of a pixel in a video
_STILL, _VIDEO = "images and sounds", "videos"
_TILE = (322, 323)  # the tags of a TIFF for the size of its tiles, which may exceed the image's


class MediaBudget:
    """What one request's media may still become."""

    def __init__(self, still: int = STILL_BYTES, video: int = VIDEO_BYTES) -> None:
        self._lock = threading.Lock()  # they are decoded in several threads
        self._most = {_STILL: still, _VIDEO: video}
        self._left = dict(self._most)

    def take(self, kind: str, size: int) -> None:
        """Raise ValueError if this is more than is left."""
        with self._lock:
            if size <= self._left[kind]:
                self._left[kind] -= size
                return
        REFUSALS.labels("content").inc()
        most = self._most[kind] // 2**20
        raise ValueError(f"the {kind} of a request must have at most {most} MiB when decoded")


# That of the request whose task this is; None outside of one.
media_budget: ContextVar[MediaBudget | None] = ContextVar("media_budget", default=None)


class BoundedConnector(MediaConnector):
    """vLLM's loader of media, with a look at each before it is decoded."""

    def load_from_url(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """The media that are at this URL, or in it. Raises ValueError if they are too large."""
        return super().load_from_url(url, _bounded(media_io), **options)

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """The same, decoded in a thread."""
        return await super().load_from_url_async(url, _bounded(media_io), **options)


def bound_media() -> None:
    """Have vLLM's frontend load media so, unless its operator has chosen another loader."""
    MEDIA_CONNECTOR_REGISTRY.register("http")(BoundedConnector)


def _bounded(media_io: MediaIO[Any]) -> MediaIO[Any]:
    """The decoder, which is made for one file, with a look at the file and at what has become."""
    budget = media_budget.get() or MediaBudget()
    if isinstance(media_io, VideoMediaIO):  # its frames may be images
        _bound(media_io.image_io, lambda data: budget.take(_STILL, _image_bytes(data)))
        _bound(media_io, lambda data: budget.take(_VIDEO, _video_bytes(media_io, data)))
    elif isinstance(media_io, ImageMediaIO):
        _bound(media_io, lambda data: budget.take(_STILL, _image_bytes(data)))
    else:  # a sound, of which vLLM bounds each
        _bound(media_io, lambda data: None, lambda sound: budget.take(_STILL, sound[0].nbytes))
    return media_io


def _bound(
    media_io: MediaIO[Any],
    look: Callable[[bytes], None],
    see: Callable[[Any], None] = lambda decoded: None,
) -> None:
    decode = media_io.load_bytes

    def load_bytes(data: bytes) -> Any:
        look(data)
        try:
            decoded = decode(data)
        except (ValueError, ImportError, MemoryError):
            raise
        except Exception as error:  # of many libraries; vLLM would take most for its own: 500
            raise ValueError(f"a file of the request can't be decoded: {error}") from error
        see(decoded)
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
