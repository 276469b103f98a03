"""The reader against ground truth: videos whose frames carry their own number, and an arrow for which way is up."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_prep.reasons import ClipError
from data_prep.video.probe import read_header
from data_prep.video.readers import DECODE_AHEAD_S, PyAvReader

STEADY = np.arange(60) / 30
UNEVEN = np.cumsum(np.r_[0, np.tile([0.01, 0.09, 0.03, 0.2], 12)])
OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0"}


def same(frame: np.ndarray) -> np.ndarray:
    return frame


def by(reader: type, path: Path | str):
    """A decoder of the file."""
    return reader(str(path), read_header(str(path)))


@pytest.mark.parametrize("fps", [4.0, 8.0, 30.0, 50.0])
@pytest.mark.parametrize("times", [STEADY, UNEVEN, np.arange(6) / 2.7], ids=["steady", "uneven", "slow"])
def test_frames_are_those_on_screen_at_lower_and_at_higher_rates(
    tmp_path: Path, write, number_of, on_screen, times, fps: float
):
    due = np.arange(int(times[-1] * fps)) / fps
    frames = by(PyAvReader, write(tmp_path / "clip.mp4", times)).frames(due, same)
    assert [number_of(frame) for frame in frames] == on_screen(times, due)


@pytest.mark.parametrize(
    ("name", "codec", "options", "b_frames"),
    [
        ("a.mp4", "libx264", {}, 3),
        ("open.mp4", "libx264", OPEN_GOP, None),
        ("open.mkv", "libx264", OPEN_GOP, None),
        ("hevc.mp4", "libx265", {"x265-params": "log-level=none:bframes=3:keyint=12"}, None),
        ("m4.mp4", "mpeg4", {}, 2),
        ("m4.avi", "mpeg4", {}, 2),
        ("h264.avi", "libx264", {}, 3),
        ("m2.mkv", "mpeg2video", {}, 2),
        ("m2.ts", "mpeg2video", {}, 2),
        ("h264.ts", "libx264", {}, 3),
        ("m2.mpg", "mpeg2video", {}, 2),
        ("h264.flv", "libx264", {}, 3),
        ("vp8.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}, None),
        ("vp9.webm", "libvpx-vp9", {"lag-in-frames": "16", "deadline": "realtime", "cpu-used": "8"}, None),
        ("av1.mp4", "libsvtav1", {"preset": "12", "crf": "20"}, None),
    ],
)
def test_clips_in_any_order_hold_the_frames_that_are_due(
    tmp_path: Path, write, number_of, on_screen, monkeypatch, name: str, codec: str, options: dict, b_frames: int | None
):
    """Rising, overlapping and falling, near and far."""
    times = np.arange(240) / 30
    path = write(tmp_path / name, times, codec, options=options, b_frames=b_frames)
    monkeypatch.setattr(
        "data_prep.video.readers.DECODE_AHEAD_S", 1.0
    )  # so that seeks are due within these eight seconds
    due = np.arange(8) / 10
    reader = by(PyAvReader, path)
    for start in (0.0, 0.9, 1.5, 4.0, 4.3, 7.1, 2.6, 0.1, 6.05):
        numbers = [number_of(frame) for frame in reader.frames(due + start, same)]
        assert numbers == on_screen(times, due + start), f"at {start} s"


def test_a_cut_file_begins_with_its_first_whole_picture(tmp_path: Path, write, number_of, cut_to_second_keyframe):
    """Copied from its second keyframe on, a stream begins with pictures that refer to the group before."""
    whole = write(tmp_path / "whole.mkv", np.arange(90) / 30, options=OPEN_GOP)
    path = cut_to_second_keyframe(whole, tmp_path / "cut.mkv")
    numbers = [number_of(frame) for frame in by(PyAvReader, path).frames(np.arange(20) / 30, same)]
    assert numbers[0] >= 9
    assert np.diff(numbers).tolist() == [1] * 19


def test_what_an_edit_list_cuts_off_is_not_shown(tmp_path: Path, write, number_of):
    import struct

    path = write(tmp_path / "clip.mp4", np.arange(90) / 30, gop=60)
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12  # duration in the film's units, time in the track's, rate: 14496-12, 8.6.6
    units = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)[0]
    duration, begin, rate = struct.unpack_from(">IiI", content, place)
    struct.pack_into(">IiI", content, place, duration - 700, begin + 7 * units // 10, rate)
    path.write_bytes(content)
    frames = by(PyAvReader, path).frames(np.arange(10) / 10, same)
    assert [number_of(frame) for frame in frames] == list(range(21, 51, 3))


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_rotation_tag_is_honoured(tmp_path: Path, write, name: str, rotation: int):
    path = write(tmp_path / name, STEADY, rotation=rotation, pictures=lambda i: arrow(i))
    assert read_header(str(path)).orientation.transposed == (rotation in (90, 270))
    frame = by(PyAvReader, path).frames(np.array([1.0]), same)[0]
    upright = np.rot90(arrow(30), rotation // 90)
    assert frame.shape == upright.shape
    assert np.abs(frame.astype(int) - upright).mean() < 12
    others = [np.rot90(arrow(30), turn) for turn in range(4) if turn != rotation // 90]
    assert all(other.shape != frame.shape or np.abs(frame.astype(int) - other).mean() > 40 for other in others)


def arrow(number: int) -> np.ndarray:
    """The number's bars in the lower half, a red arrow to the left in the upper one."""
    from_bars = np.zeros((64, 128, 3), np.uint8)
    bits = [235 if number >> (7 - bit) & 1 else 20 for bit in range(8)]
    from_bars[32:] = np.repeat(np.array(bits, np.uint8), 16)[None, :, None]
    for column in range(32):
        from_bars[16 - column // 2 : 16 + column // 2, 8 + column] = 235, 30, 30
    return from_bars


@pytest.mark.parametrize("size", [(18, 18), (32, 18), (50, 34), (66, 98), (130, 70), (134, 238), (202, 64)])
def test_frames_of_any_size_are_whole(tmp_path: Path, write, size):
    """Rows are padded inside a decoder; no padding may reach the frame."""
    rng = np.random.default_rng(0)
    noise = [np.kron(rng.integers(0, 256, (9, 9, 3), np.uint8), np.ones((28, 28, 1), np.uint8)) for _ in range(4)]
    drawn = [image[: size[1], : size[0]].copy() for image in noise]
    path = write(tmp_path / "a.mp4", np.arange(4) / 30, size=size, options={"qp": "4"}, pictures=lambda i: drawn[i])
    frames = by(PyAvReader, path).frames(np.arange(4) / 30, same)
    assert [frame.shape for frame in frames] == [(size[1], size[0], 3)] * 4
    assert np.abs(np.stack(frames).astype(int) - np.stack(drawn)).mean() < 20  # chroma has half the pixels


def test_transparent_parts_are_black(tmp_path: Path, write):
    """A red field of which the right half is clear, in VP9, VP8 and PNG."""
    field = np.zeros((64, 128, 4), np.uint8)
    field[..., 0], field[:, :64, 3] = 220, 255
    for name, codec, pix_fmt in (
        ("vp9.webm", "libvpx-vp9", "yuva420p"),
        ("vp8.webm", "libvpx", "yuva420p"),
        ("png.mov", "png", "rgba"),
    ):
        options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
        path = write(
            tmp_path / name, np.arange(4) / 30, codec, options=options, pix_fmt=pix_fmt, pictures=lambda _: field
        )
        frame = by(PyAvReader, path).frames(np.zeros(1), same)[0]
        assert frame[:, :56, 0].min() > 190, name
        assert frame[:, 72:].max() < 12, name


def test_a_gif_is_read_by_its_own_delays(shared: Path):
    path = shared / "data" / "clips" / "derived" / "flower.gif"
    assert len(by(PyAvReader, path).frames(np.arange(16) / 8, same)) == 16


def test_frames_beyond_the_end_are_not_given(tmp_path: Path, write):
    reader = by(PyAvReader, write(tmp_path / "clip.mp4", STEADY))
    assert len(reader.frames(np.arange(30) / 10, same)) == 20
    assert reader.end == pytest.approx(2.0, abs=1e-3)
    assert reader.frames(np.arange(8) / 8 + 1.9, same) == []


def test_a_frame_is_fitted_once_though_it_is_due_twice(tmp_path: Path, write):
    path = write(tmp_path / "clip.mp4", np.arange(4) / 2)
    frames = by(PyAvReader, path).frames(np.arange(16) / 8, np.copy)
    assert (len(frames), len({id(frame) for frame in frames})) == (16, 4)


@pytest.mark.parametrize("seconds", [DECODE_AHEAD_S + 5.0])
def test_only_due_frames_are_converted_after_a_seek(tmp_path: Path, write, number_of, seconds: float, monkeypatch):
    path = write(tmp_path / "long.mp4", np.arange(600) / 30, gop=30)
    reader = by(PyAvReader, path)
    decoded: list[float] = []
    to_rgb: Callable = reader.to_rgb
    monkeypatch.setattr(reader, "to_rgb", lambda frame: (decoded.append(frame.time), to_rgb(frame))[1])
    numbers = [number_of(frame) for frame in reader.frames(seconds + np.arange(4) / 4, same)]
    assert numbers == [(int(seconds * 30) + i) % 256 for i in (0, 7, 15, 22)]
    assert len(decoded) == 4


def test_frames_before_the_damage_are_given_and_after_it_none(shared: Path):
    """The file's first damaged picture is shown at 1.03 s; decoders that look ahead meet it earlier."""
    due = np.arange(16) / 16
    whole = by(PyAvReader, shared / "data" / "clips" / "flower.mp4").frames(due, same)
    reader = by(PyAvReader, shared / "data" / "broken" / "corrupt_mdat.mp4")
    np.testing.assert_array_equal(np.stack(reader.frames(due, same)), np.stack(whole))
    with pytest.raises(ClipError, match=r"decoding fails at 0\.97 s") as error:
        reader.frames(due * 2, same)
    assert error.value.reason == "corrupt"


def test_pixels_that_are_not_square_are_known(tmp_path: Path, write):
    path = write(tmp_path / "clip.mp4", STEADY, pixel_aspect=Fraction(16, 9), rotation=90)
    header = read_header(str(path))
    assert header.pixel_aspect == pytest.approx(16 / 9)
    assert header.display_size == pytest.approx((64, 128 * 16 / 9))


def test_writing_av1_leaves_no_realtime_thread_behind(tmp_path: Path, write):
    """Which would starve every process that later tests start."""
    write(tmp_path / "av1.mp4", STEADY, "libsvtav1", options={"preset": "12"})
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
