"""Frames against ground truth: videos whose frames carry their own number."""

import struct
from pathlib import Path

import numpy as np
import pytest

from data_prep.buckets import Bucket
from data_prep.clips import frames_by_av, frames_by_decord, read_clip
from data_prep.headers import read_header
from data_prep.reasons import ClipError

BUCKET = Bucket(8, 32, 64, 8)
STEADY = np.arange(60) / 30
UNEVEN = np.cumsum(np.r_[0, np.tile([0.01, 0.09, 0.03, 0.2], 12)])


@pytest.mark.parametrize("times", [STEADY, UNEVEN, np.arange(6) / 2.7], ids=["steady", "uneven", "slow"])
@pytest.mark.parametrize("reader", [frames_by_decord, lambda *a: frames_by_av(*a, "")], ids=["decord", "av"])
def test_frames_are_the_nearest_in_time(tmp_path: Path, write, number_of, times, reader):
    path = str(write(tmp_path / "clip.mp4", times))
    frames, _ = reader(path, read_header(path), BUCKET)
    expected = [int(np.abs(times - k / 8).argmin()) for k in range(8)]
    assert [number_of(frame) for frame in frames] == expected
    assert frames.shape == (8, 32, 64, 3)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("clip.ts", "mpeg2video"), ("clip.webm", "libvpx"), ("clip.mkv", "libx264"), ("clip.avi", "mpeg4")],
)
def test_every_container_gives_the_same_frames(tmp_path: Path, write, number_of, name: str, codec: str):
    times = np.arange(60) / 30
    path = write(tmp_path / name, times, codec)
    expected = [int(np.abs(times - k / 8).argmin()) for k in range(8)]
    numbers = [number_of(frame) for frame in read_clip(str(path), BUCKET).frames]
    assert [abs(a - b) <= 1 for a, b in zip(numbers, expected, strict=True)] == [True] * 8  # milliseconds tip a tie
    assert numbers[0] == 0


def test_a_rotation_tag_is_honoured_by_both_decoders(tmp_path: Path, write, number_of):
    path = write(tmp_path / "clip.mp4", STEADY)
    content = bytearray(path.read_bytes())
    matrix = content.index(struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), content.index(b"tkhd"))
    # x' = -y, y' = x (ISO/IEC 14496-12, 6.2.2): what was at the left comes to the top, a quarter turn clockwise.
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    upright = Bucket(8, 64, 32, 8)
    for reader in (frames_by_decord, lambda *a: frames_by_av(*a, "")):
        frames, _ = reader(str(path), read_header(str(path)), upright)
        assert [number_of(np.rot90(frame)) for frame in frames] == [
            int(np.abs(STEADY - k / 8).argmin()) for k in range(8)
        ]


def test_pixels_that_are_not_square_are_stretched(shared: Path):
    folder = shared / "data" / "clips" / "derived"
    wide = Bucket(4, 90, 160, 8)
    stretched = read_clip(str(folder / "anamorphic_sar.mp4"), wide).frames.astype(float)
    square = read_clip(str(folder / "flower_mpeg4.avi"), wide).frames.astype(float)
    assert np.abs(stretched - square).mean() < 6


def test_a_video_shorter_than_the_clip_is_too_short(tmp_path: Path, write):
    path = write(tmp_path / "clip.mp4", STEADY[:20])
    with pytest.raises(ClipError) as error:
        read_clip(str(path), BUCKET)
    assert error.value.reason == "too_short"
    assert error.value.message == "lasts 0.67 s; a clip of 8 frames at 8 fps takes 1.00 s"


def test_a_cut_file_is_truncated_unless_its_clip_lies_before_the_break(tmp_path: Path, write, number_of):
    path = write(tmp_path / "clip.mkv", np.arange(120) / 30, "mpeg4")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    clip = read_clip(str(path), BUCKET)
    assert [number_of(frame) for frame in clip.frames] == [
        int(np.abs(np.arange(120) / 30 - k / 8).argmin()) for k in range(8)
    ]
    assert "breaks off" in clip.remark
    path.write_bytes(whole[: len(whole) // 8])
    with pytest.raises(ClipError) as error:
        read_clip(str(path), BUCKET)
    assert error.value.reason == "truncated"


@pytest.mark.parametrize(
    ("file", "reason"),
    {
        "audio_only.mp4": "no_video_stream",
        "html_404.webm": "unreadable",
        "huge_dims_header.mp4": "too_large",
        "only_ftyp.mp4": "unreadable",
        "random_bytes.mp4": "unreadable",
        "text_renamed.mp4": "unreadable",
        "truncated_no_moov.mp4": "unreadable",
        "zero_bytes.mp4": "unreadable",
    }.items(),
)
def test_a_broken_file_has_a_true_reason(shared: Path, file: str, reason: str):
    with pytest.raises(ClipError) as error:
        read_clip(str(shared / "data" / "broken" / file), BUCKET)
    assert error.value.reason == reason
    assert error.value.message


@pytest.mark.parametrize(
    "file",
    ["corrupt_mdat.mp4", "truncated.mkv", "truncated_60pct.mp4", "wrong_extension_gif.mp4", "wrong_extension_webm.avi"],
)
def test_a_file_that_can_give_a_clip_gives_one(shared: Path, file: str):
    assert read_clip(str(shared / "data" / "broken" / file), BUCKET).frames.shape == (8, 32, 64, 3)


def test_a_clip_past_the_damage_is_corrupt_or_truncated(shared: Path):
    for file, reason in (("corrupt_mdat.mp4", "corrupt"), ("truncated_60pct.mp4", "truncated")):
        with pytest.raises(ClipError) as error:
            read_clip(str(shared / "data" / "broken" / file), Bucket(32, 32, 64, 8))
        assert error.value.reason == reason


def test_frames_are_antialiased(tmp_path: Path):
    from data_prep.clips import fit

    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))[..., None].repeat(3, 2)  # one pixel dark, one bright
    assert np.abs(fit(stripes, Bucket(1, 16, 16, 8), 1.0).astype(int) - 127).max() < 20


def test_frames_of_the_buckets_own_size_are_untouched():
    from data_prep.clips import fit

    frame = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(frame, BUCKET, 1.0), frame)
