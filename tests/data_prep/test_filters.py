"""Filters on images of known darkness, motion and sharpness."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from data_prep import filters
from data_prep.filters import check_pixels, motion, perceptual_hash, sharpness
from data_prep.reasons import ClipError
from sora_train.data.config import SelectionConfig

EVERYTHING = SelectionConfig(black=True, frozen=True, min_motion=1.0, max_motion=50.0, min_sharpness=10.0)


def texture(seed: int = 0, height: int = 400, width: int = 900) -> np.ndarray:
    """A grey picture uint8 `H W` with detail of all sizes."""
    rng, picture = np.random.default_rng(seed), np.full((height, width), 128.0)
    for size in (2, 4, 8, 16, 32):
        coarse = rng.uniform(-2 * size, 2 * size, (height // size, width // size))
        picture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture.clip(0, 255).astype(np.uint8)


def moving(step: float, count: int = 8, height: int = 256, width: int = 256) -> np.ndarray:
    """Frames `F H W 3` over which a texture moves by `step` pixels from one to the next."""
    whole = texture()
    ways = [np.array([[1.0, 0, -20 - step * i], [0, 1.0, -50]]) for i in range(count)]
    return np.stack([cv2.cvtColor(cv2.warpAffine(whole, way, (width, height)), cv2.COLOR_GRAY2RGB) for way in ways])


def reason(frames: np.ndarray, config: SelectionConfig, fps: float = 8.0) -> str:
    """Why frames are not kept, or nothing; a message that doesn't name the key is marked."""
    try:
        check_pixels(frames, fps, config)
    except ClipError as error:
        return error.reason if "(selection." in error.message else f"{error.reason}, but which key?"
    return ""


def encoded(path: Path, pictures: Callable[[int], np.ndarray], codec: str, **options: str) -> np.ndarray:
    """Sixteen frames as they come out of a codec."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=16, options=options)
        stream.height, stream.width = pictures(0).shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.gop_size, stream.codec_context.thread_count = 6, 1
        for i in range(16):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pictures(i), format="rgb24")))
        file.mux(stream.encode())
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_a_clip_is_black_if_98_percent_of_every_frame_are_dark():
    black = np.full((4, 100, 100, 3), 25, np.uint8)
    black[:, :2] = 255  # exactly 2 % of the pixels
    assert reason(black, SelectionConfig(black=True)) == "black"
    assert reason(black, SelectionConfig()) == ""
    brighter = black.copy()
    brighter[2, 2, 0] = 26
    assert reason(brighter, SelectionConfig(black=True)) == ""
    assert reason(np.full_like(black, 26), SelectionConfig(black=True)) == ""


@pytest.mark.parametrize(
    ("codec", "options", "noise"),
    [("libx264", {"crf": "28"}, 0), ("libx264", {"crf": "23"}, 5), ("mpeg2video", {"qmax": "8"}, 0)],
)
def test_a_still_image_is_frozen_despite_codec_and_camera_noise(
    shared: Path, tmp_path: Path, codec: str, options: dict[str, str], noise: float
):
    with av.open(str(shared / "data/clips/flower.mp4")) as file:
        photograph = next(file.decode(video=0)).to_ndarray(format="rgb24")[:256, :256]
    rng = np.random.default_rng(0)

    def rustling(_: int) -> np.ndarray:
        return (photograph + rng.normal(0, noise, photograph.shape)).clip(0, 255).astype(np.uint8)

    frames = encoded(tmp_path / "still.mkv", rustling, codec, **options)
    assert (frames[1:] != frames[:-1]).any()
    assert reason(frames, SelectionConfig(frozen=True)) == "frozen"
    assert reason(frames, SelectionConfig(min_motion=0.5)) == "too_still"
    frames[-1, 100:108, 100:108] ^= 128  # a thousandth of one frame
    assert reason(frames, SelectionConfig(frozen=True)) == ""


@pytest.mark.parametrize("step", [0.5, 2, 5, 10, 25])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (192, 320)])
def test_motion_is_the_true_shift_in_percent_of_the_width(step: float, height: int, width: int):
    frames = moving(step, height=height, width=width)
    assert motion(frames, 8.0) == pytest.approx(step / width * 100 * 8.0, rel=0.12)
    assert motion(frames, 16.0) == pytest.approx(2 * motion(frames, 8.0))


def test_repeated_frames_do_not_change_motion():
    assert motion(np.repeat(moving(4, 9)[:-1], 2, axis=0)[1:], 16.0) == pytest.approx(4 / 256 * 100 * 8.0, rel=0.1)


def test_motion_outside_its_bounds_is_filtered():
    slow, fast = moving(0.2), moving(12)  # 0.6 and 37.5 percent per second
    bounds = SelectionConfig(min_motion=1.0, max_motion=30.0)
    assert (reason(slow, bounds), reason(moving(2), bounds), reason(fast, bounds)) == ("too_still", "", "too_lively")
    assert reason(fast, SelectionConfig(min_motion=1.0)) == ""
    assert reason(slow, SelectionConfig(max_motion=30.0)) == ""


@pytest.mark.parametrize("shape", [(8, 8), (64, 8), (8, 512), (1, 5)])
def test_motion_and_hash_of_tiny_images_are_finite(shape: tuple[int, int]):
    frames = np.random.default_rng(0).integers(0, 255, (3, *shape, 3), dtype=np.uint8)
    assert np.isfinite(motion(frames, 8.0))
    assert len(perceptual_hash(frames)) == 48


def test_sharpness_is_the_variance_of_the_laplacian():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    frames = np.repeat(np.repeat(board[None, ..., None], 3, 3), 3, 0)
    assert sharpness(frames) == pytest.approx((4 * 255) ** 2)  # every pixel differs from its four neighbours by 255
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, None, :, None], (3, 64, 64, 3))
    edges = np.zeros((64, 64))
    edges[:, 0], edges[:, -1] = 2, -2  # OpenCV mirrors the picture at its border
    assert sharpness(ramp) == pytest.approx(edges.var())


def test_blurring_makes_a_clip_blurred():
    frames = moving(2)
    bound = SelectionConfig(min_sharpness=sharpness(frames) / 2)
    assert reason(frames, bound) == ""
    assert reason(np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in frames]), bound) == "blurred"


def test_the_first_of_several_reasons_is_given():
    black = np.zeros((4, 64, 64, 3), np.uint8)
    assert reason(black, EVERYTHING) == "black"
    assert reason(black + np.uint8(99), EVERYTHING) == "frozen"
    assert reason(black + np.uint8(99), EVERYTHING.model_copy(update={"frozen": False})) == "too_still"


def test_an_image_is_neither_still_nor_frozen():
    assert reason(moving(0, 1), EVERYTHING) == ""
    assert reason(moving(0, 1) // 16, EVERYTHING) == "black"
    assert reason(moving(0, 1) // 16 + np.uint8(99), EVERYTHING) == "blurred"


def test_filters_that_are_off_are_not_computed(monkeypatch: pytest.MonkeyPatch):
    for name in ("black_share", "max_block_change", "motion", "sharpness"):
        monkeypatch.delattr(filters, name)
    check_pixels(moving(0), 8.0, SelectionConfig())


def test_the_hash_is_imagehashs_of_three_frames():
    import imagehash
    from PIL import Image

    frames = np.concatenate([moving(40, 3, 64, 64), moving(0, 2, 64, 64)])
    said = [str(imagehash.phash(Image.fromarray(frames[i]))) for i in (0, 2, 4)]
    found = perceptual_hash(frames)
    bits = [int(a, 16) ^ int(found[16 * i : 16 * i + 16], 16) for i, a in enumerate(said)]
    assert max(bit.bit_count() for bit in bits) <= 2  # OpenCV's grey and Pillow's differ by rounding
    assert perceptual_hash(frames[:1]) == found[:16] * 3
    assert perceptual_hash(frames) == found


def test_importing_filters_imports_no_heavy_package():
    heavy = ("torch", "ray", "scenedetect", "imagehash", "scipy")
    code = f"import sys, data_prep.filters; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
