"""Given frames are what prep makes of the same image or video, and a file that is neither is refused by name."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageCms

from data_prep.given import read_given
from data_prep.schemas import SOURCE
from data_prep.stages import Decode
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.errors import UserError
from tests.data_prep.clip_files import plan_clips, read_clip

TIMES = np.arange(60) / 30
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"rXYZ", b"xXYZ")
SWAPPED = SWAPPED.replace(b"gXYZ", b"rXYZ").replace(b"xXYZ", b"gXYZ")  # a profile whose red is green


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def by_prep(path: Path, data: DataConfig) -> np.ndarray:
    """The frames of a source's first clip, as the stage of `sora prep` hands them to the VAE."""
    row = {"row_id": "r", "source": path.name, "source_size": 1, "source_version": "", "captions": ["x"]}
    row |= {"path": str(path), "skip": []}
    stage = Decode(data.model_copy(update={"root": str(path.parent)}), SelectionConfig(), 1)
    (table, *_) = stage(pa.Table.from_pylist([{name: row.get(name) for name in {*SOURCE, *row}}]))
    (clip, *_) = [clip for clip in table.to_pylist() if clip["frames"] is not None]
    stage.decoder.close()
    return np.frombuffer(clip["frames"], np.uint8).reshape(-1, *data.shapes[0][1:], 3)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("turned.jpg", "RGB", {"exif": 6}),
        ("wide.png", "RGB", {}),
        ("profile.png", "RGB", {"icc_profile": SWAPPED}),
        ("grey.webp", "L", {}),
        ("clear.tiff", "RGBA", {}),
        ("one.gif", "RGB", {}),
    ],
)
def test_an_image_is_fitted_as_prep_fits_it(tmp_path: Path, name: str, mode: str, options: dict):
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {"exif": exif}
    Image.fromarray(noise(90, 151)).convert(mode).save(tmp_path / name, **options)
    (given,) = read_given([str(tmp_path / name)], "--image", (1, 32, 48), 8.0)
    expected = by_prep(tmp_path / name, DataConfig(buckets=("1x32x48",), fps=8.0))
    np.testing.assert_array_equal(given.frames, expected)
    assert given.frames.std() > 10


def test_a_real_clips_last_frames_are_those_of_preps_clip_there(shared: Path):
    path = sorted((shared / "data" / "clips").glob("*.mp4"))[0]
    (given,) = read_given([str(path)], "--video", (5, 32, 48), 8.0)
    data = DataConfig(frames=5, height=32, width=48, fps=8.0)
    end = plan_clips(str(path), data, SelectionConfig()).seconds
    np.testing.assert_array_equal(given.frames, by_prep(path, data.model_copy(update={"start_s": end - 5 / 8})))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_video_gives_its_very_last_frames(tmp_path: Path, write, number_of, on_screen, name: str):
    path = write(tmp_path / name, TIMES, "mpeg4" if name.endswith("avi") else "libx264")
    (given,) = read_given([str(path)], "--video", (5, 32, 64), 30.0)
    assert [number_of(frame) for frame in given.frames] == [55, 56, 57, 58, 59]
    (given,) = read_given([str(path)], "--video", (5, 32, 64), 8.0)
    assert [number_of(frame) for frame in given.frames] == on_screen(TIMES, 2 - np.arange(5, 0, -1) / 8)
    span = plan_clips(
        str(path), data := DataConfig(frames=5, height=32, width=64, fps=8, start_s=1.375), SelectionConfig()
    )
    clip = read_clip(str(path), span.spans[0], data, SelectionConfig(), "")
    np.testing.assert_array_equal(given.frames, clip.frames)
    assert given.sha256 == clip.content_hash
    (given,) = read_given([str(path)], "--video", (1, 32, 64), 30.0)
    assert number_of(given.frames[0]) == 59


def refusal(name: Path | str, key: str = "--image", frames: int = 1, max_enlarge: float = 0.0) -> str:
    with pytest.raises(UserError) as error:
        read_given([str(name)], key, (frames, 32, 32), 8.0, max_enlarge)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{key} ")
    return str(error.value)


def test_a_file_that_is_no_image_is_refused_with_what_to_do(tmp_path: Path, write):
    clip = write(tmp_path / "clip.mp4", TIMES).rename(tmp_path / "clip.png")
    Image.fromarray(noise(8, 8)).save(tmp_path / "small.png")
    Image.fromarray(noise(64, 64)).save(tmp_path / "a\nb.png")
    whole = (tmp_path / "a\nb.png").read_bytes()
    (tmp_path / "cut\nhere.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("a red circle\n" * 50)
    (tmp_path / "empty.png").write_bytes(b"")
    pictures = [Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (50, 100, 150)]
    for kind in ("gif", "png", "webp"):
        path = tmp_path / f"moving.{kind}"
        pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], duration=250)
    assert "there is no such file" in refusal(tmp_path / "nowhere.png")
    assert "is a folder. Name a file" in refusal(tmp_path)
    assert "is not a regular file" in refusal("/dev/zero")
    assert "is remote. Copy it" in refusal("s3://bucket/first.png")
    assert "text.png is not an image. Name an image: JPEG, PNG" in refusal(tmp_path / "text.png")
    assert "supported, or is a playlist; convert it to mp4" in refusal(tmp_path / "text.png", "--video")
    assert "empty.png is empty. Name another file" in refusal(tmp_path / "empty.png")
    assert "cut here.png: the PNG is damaged or ends early" in refusal(tmp_path / "cut\nhere.png")
    assert "is a video or an animation. --video continues its last frames" in refusal(clip)
    assert "is a video or an animation. Name an image: JPEG" in refusal(clip, "validation.images")
    assert "is a video or an animation" in refusal(tmp_path / "moving.gif")
    assert "is a video or an animation" in refusal(tmp_path / "moving.png")
    assert "is an animated WebP, which is not read; convert it" in refusal(tmp_path / "moving.webp")
    assert "is an image. Use --image" in refusal(tmp_path / "small.png", "--video")
    assert "lasts 2.00 s; a clip of 17 frames at 8 fps takes 2.12 s" in refusal(clip, "--video", 17)
    assert "would enlarge it 4.00 times, the bound is 1.25 (data.max_enlarge)" in refusal(
        tmp_path / "small.png", max_enlarge=1.25
    )


def test_a_small_image_is_enlarged_with_a_warning(tmp_path: Path, capsys):
    Image.fromarray(noise(8, 8)).save(tmp_path / "small.png")
    (given,) = read_given([str(tmp_path / "small.png")], "--image", (1, 32, 32), 8.0)
    assert given.frames.shape == (1, 32, 32, 3)
    assert "is 8x8 and is enlarged 4.0 times to 32x32" in capsys.readouterr().err


def test_several_images_come_in_order_each_read_once(tmp_path: Path):
    for i in range(2):
        Image.fromarray(np.full((32, 32, 3), 100 * i, np.uint8)).save(tmp_path / f"{i}.png")
    names = [str(tmp_path / f"{i}.png") for i in (1, 0, 1)]
    given = read_given(names, "--image", (1, 32, 32), 8.0)
    assert [int(each.frames.mean()) for each in given] == [100, 0, 100]
    assert given[0] is given[2]
    assert given[0].file_name != given[1].file_name
