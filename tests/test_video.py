"""What is written to mp4, gif and contact sheet is read back."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_train.errors import one_line
from sora_train.quickstart.shapes import Scene, draw
from sora_train.video import contact_sheet, fit, font, psnr, read_mp4, slug, write_gif, write_mp4

HOSTILE = [
    "",
    "two\nlines\r\nand\ttabs",
    "emoji 🎬🟦👩‍👩‍👧 and Chinese 猫",
    "x" * 10_000,
    "word " * 2_000,
    "שלום \u202eright to left\u202c مرحبا",
    "\x00\x07<script>alert(1)</script>\ud800",
    "a\u0301\u0302\u0303" * 400,
]


def clip(seed: int = 0) -> np.ndarray:
    return draw(Scene("red", "circle", "left"), np.random.default_rng(seed))


def test_an_mp4_holds_the_frames_that_were_written(tmp_path):
    write_mp4(tmp_path / "a.mp4", clip(), fps=8)
    read = read_mp4(tmp_path / "a.mp4")
    assert read.shape == clip().shape
    assert np.abs(read.astype(int) - clip()).mean() < 3


def test_an_mp4_of_odd_size_is_padded_to_even(tmp_path):
    write_mp4(tmp_path / "a.mp4", clip()[:3, :33, :35], fps=7.5)
    assert read_mp4(tmp_path / "a.mp4").shape == (3, 34, 36, 3)


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4, 3)), np.zeros((0, 4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]
)
def test_anything_but_uint8_rgb_frames_is_refused(tmp_path, frames):
    for write in (write_mp4, write_gif):
        with pytest.raises(ValueError, match="uint8 frames of shape F H W 3"):
            write(tmp_path / "a", frames, fps=8)


def test_a_gif_holds_the_frames_loops_and_keeps_its_time(tmp_path):
    write_gif(tmp_path / "a.gif", clip(), fps=8)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 8
        assert gif.info["loop"] == 0
        durations, worst = [], 0.0
        for i, wanted in enumerate(clip()):
            gif.seek(i)
            durations.append(gif.info["duration"])
            worst = max(worst, np.abs(np.asarray(gif.convert("RGB")).astype(int) - wanted).mean())
    assert sum(durations) == 1000
    assert worst < 3


def test_a_large_gif_is_scaled_down_and_keeps_its_proportions(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (2, 40, 100, 3), dtype=np.uint8)
    write_gif(tmp_path / "a.gif", frames, fps=24, longest_side=50)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (50, 20)


def test_a_sheet_shows_first_and_last_frames_at_their_places():
    video = np.zeros((10, 96, 96, 3), np.uint8)
    video[0], video[-1] = (255, 0, 0), (0, 0, 255)
    sheet = np.asarray(contact_sheet([video, video], ["one", "two"], columns=1, frames=4))
    assert tuple(sheet[30, 30]) == (255, 0, 0)
    assert tuple(sheet[30, sheet.shape[1] - 30]) == (0, 0, 255)


def test_a_sheet_grows_by_rows_not_by_captions():
    videos = [clip(i) for i in range(len(HOSTILE))]
    plain = contact_sheet(videos, ["a"] * len(videos), ["held out"] * len(videos))
    hostile = contact_sheet(videos, HOSTILE, HOSTILE)
    assert hostile.size == plain.size
    assert contact_sheet(videos[:2], HOSTILE[:2]).width == plain.width


def test_clips_of_different_sizes_and_lengths_share_a_sheet():
    videos = [clip(), clip()[:1], np.zeros((3, 20, 200, 3), np.uint8), np.zeros((20, 200, 20, 3), np.uint8)]
    assert contact_sheet(videos, ["a", "b", "c", "d"], columns=3).width > 0


def test_a_sheet_wants_a_label_for_every_clip():
    with pytest.raises(ValueError, match="2, 1, 2"):
        contact_sheet([clip(), clip()], ["one"])


@pytest.mark.parametrize("text", HOSTILE)
def test_a_fitted_label_is_one_line_no_wider_than_asked(text):
    face = font(18)
    fitted = fit(text, face, 200)
    assert face.getlength(fitted) <= 200
    assert one_line(fitted) == fitted


def test_a_slug_is_a_safe_file_name_and_tells_prompts_apart():
    assert slug("A blue square, moving up!") == "a-blue-square-moving-up"
    prompts = [*HOSTILE, "../../etc/passwd", "猫", "犬", "x" * 9_999, "-rf", ".."]
    slugs = [slug(prompt) for prompt in prompts]
    assert len(set(slugs)) == len(prompts)
    for name in slugs:
        assert name.strip("abcdefghijklmnopqrstuvwxyz0123456789-") == ""
        assert 0 < len(name) <= 60
        assert name[0] != "-"


def test_the_encoder_works_without_the_tree_that_reads_memory_nobody_wrote(tmp_path: Path):
    """With it the same frames gave other files now and then, about every third time for the quickstart's samples."""
    write_mp4(tmp_path / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), 8)
    assert b" mbtree=0 " in (tmp_path / "a.mp4").read_bytes()  # x264 writes its settings into the stream


def test_psnr_is_20_log_of_255_over_a_constant_error():
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    assert np.isclose(psnr(frames + np.uint8(5), frames), 20 * np.log10(255 / 5))
    assert psnr(frames, frames) == float("inf")
