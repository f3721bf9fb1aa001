"""Images, sounds and videos become no more than a request may have, wherever they come from."""

import asyncio
import base64
import contextlib
import io
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaIO

from llumnix.engine.vllm.frontend import media
from llumnix.engine.vllm.frontend.media import bound_media
from llumnix.engine.vllm.frontend.media_budgets import MediaBudget, media_budget
from llumnix.metrics import REFUSALS
from tests.kit.loop import on_loop

MIB = 2**20


def image(kind: str = "PNG", size: tuple[int, int] = (512, 512), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, kind, **options)
    return file.getvalue()


def video(folder: Path, frames: int = 60, size: tuple[int, int] = (640, 480)) -> bytes:
    path = folder / "video.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30.0, size)
    for _ in range(frames):
        writer.write(np.zeros((size[1], size[0], 3), np.uint8))
    writer.release()
    return path.read_bytes()


def url(kind: str, *data: bytes) -> str:
    return f"data:{kind};base64," + ",".join(base64.b64encode(part).decode() for part in data)


def connector(**options: Any) -> Any:
    """As vLLM's parser of messages makes one."""
    bound_media()
    return MEDIA_CONNECTOR_REGISTRY.load("http", media_io_kwargs=options)


@on_loop
async def test_images_of_a_request_are_counted_together() -> None:
    media_budget.set(MediaBudget(still=3 * MIB))
    sent, before = url("image/png", image()), REFUSALS.labels("content")._value.get()
    assert len(sent) < 3000
    loaded = await asyncio.gather(*(connector().fetch_image_async(sent) for _ in range(3)))
    assert [(one.media.size, one.media.mode) for one in loaded] == [((512, 512), "RGB")] * 3
    with pytest.raises(ValueError, match="images and sounds of a request must have at most 3 MiB"):
        await connector().fetch_image_async(sent)
    assert REFUSALS.labels("content")._value.get() == before + 1
    media_budget.set(MediaBudget(still=3 * MIB))
    assert connector().fetch_image(sent).media.size == (512, 512)


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
@on_loop
async def test_images_that_clients_send(kind: str) -> None:
    loaded = await connector().fetch_image_async(url("image/x", image(kind)))
    assert loaded.media.size == (512, 512)


@pytest.mark.parametrize("data", [image("ICO"), image("ICNS"), b"", b"text", image()[:40]])
@on_loop
async def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(ValueError, match="an image must be one of"):
        await connector().fetch_image_async(url("image/png", data))


def test_a_tile_may_be_larger_than_its_image() -> None:
    """And is what a decoder makes first."""
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: 4096, 323: 2048, 324: 8, 325: 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = struct.pack("<4sIH", b"II*\0", 8, len(tags)) + entries + bytes(64)
    assert Image.open(io.BytesIO(data)).size == (16, 16)
    assert media._image_bytes(data) == 4096 * 2048 * 4


@on_loop
async def test_a_broken_image_is_its_clients() -> None:
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        whole = image(kind, (64, 640))
        for at in range(10, len(whole), len(whole) // 20 + 1):
            broken = whole[:at] + b"\xff\x00\x81" + whole[at + 3 :]
            with contextlib.suppress(ValueError):
                await connector().fetch_image_async(url("image/png", broken))


@on_loop
async def test_frames_of_a_video_are_counted(tmp_path: Path) -> None:
    frame = 640 * 480 * 3
    sent = url("video/avi", video(tmp_path))
    for options, frames in (({}, 32), ({"num_frames": 8}, 8), ({"num_frames": -1}, 60)):
        for video_options in (options, {**options, "video_backend": "opencv"}):
            media_budget.set(MediaBudget(video=frames * frame))
            loaded, _ = await connector(video=video_options).fetch_video_async(sent)
            assert len(loaded) == frames
            media_budget.set(MediaBudget(video=frames * frame - 1))
            with pytest.raises(ValueError, match="the videos of a request"):
                await connector(video=video_options).fetch_video_async(sent)
    media_budget.set(MediaBudget(video=4 * frame))  # by the clock, two in a second
    loaded, _ = await connector(video={"num_frames": -1, "fps": 2}).fetch_video_async(sent)
    assert len(loaded) == 4


@on_loop
async def test_loaders_that_choose_frames_in_their_own_way(tmp_path: Path) -> None:
    sent = url("video/avi", video(tmp_path))
    for loader in ("qwen2_vl", "qwen3_vl", "opencv_dynamic"):
        options = {"video_backend": loader}
        loaded, _ = await connector(video=options).fetch_video_async(sent)
        media_budget.set(MediaBudget(video=loaded.nbytes - 1))
        with pytest.raises(ValueError, match="the videos of a request"):
            await connector(video=options).fetch_video_async(sent)
        media_budget.set(None)


@on_loop
async def test_a_video_says_too_many_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "FRAMES", 59)
    with pytest.raises(ValueError, match="at most 59 frames"):
        await connector().fetch_video_async(url("video/avi", video(tmp_path)))


@on_loop
async def test_frames_that_are_images() -> None:
    sent = url("video/jpeg", *[image("JPEG")] * 4)
    media_budget.set(MediaBudget(still=4 * MIB))
    loaded, _ = await connector().fetch_video_async(sent)
    assert len(loaded) == 4
    media_budget.set(MediaBudget(still=4 * MIB - 1))
    with pytest.raises(ValueError, match="the images and sounds"):
        await connector().fetch_video_async(sent)


class _Sound(MediaIO[Any]):
    """A decoder of sounds of a second each, as the libraries for real ones need not be here."""

    def load_bytes(self, data: bytes) -> Any:
        return np.zeros(16_000, np.float32), 16_000

    def load_base64(self, media_type: str, data: str) -> Any:
        return self.load_bytes(base64.b64decode(data))

    def load_file(self, filepath: Path) -> Any:
        raise NotImplementedError


@on_loop
async def test_sounds_are_counted_with_images() -> None:
    media_budget.set(MediaBudget(still=64_000 + MIB))
    sent = url("audio/wav", b"x")
    await connector().load_from_url_async(sent, _Sound())
    await connector().fetch_image_async(url("image/png", image()))
    with pytest.raises(ValueError, match="the images and sounds"):
        await connector().load_from_url_async(sent, _Sound())


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
@on_loop
async def test_for_a_model_of_texts_alone_nothing_is_fetched(kind: str, tmp_path: Path) -> None:
    bound_media(any_at_all=False)
    loader: Any = MEDIA_CONNECTOR_REGISTRY.load("http", allowed_local_media_path=str(tmp_path))
    bound_media()
    for where in ("http://127.0.0.1:9/x", f"file://{tmp_path}/x", url("image/png", image())):
        with pytest.raises(ValueError, match="takes texts alone"):
            await getattr(loader, f"fetch_{kind}_async")(where)
        with pytest.raises(ValueError, match="takes texts alone"):
            getattr(loader, f"fetch_{kind}")(where)
