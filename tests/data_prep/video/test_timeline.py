"""Timestamps that jump, stand still, begin anew, repeat or overflow: the clips are those a player would show."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.reasons import ClipError
from data_prep.video.clips import Clip, ClipPlan, Source
from data_prep.video.probe import read_header
from data_prep.video.timeline import read_timeline
from sora_train.data.config import DataConfig, SelectionConfig

DATA = DataConfig(frames=8, fps=8.0, height=64, width=128, stride_s=1.0)
HOLE = np.r_[np.arange(48), np.arange(50) + 960 + 48] / 16  # 60 s without a frame, from second 3 on


def clips(path: Path, data: DataConfig = DATA, **selection) -> tuple[ClipPlan, list[Clip]]:
    source = Source(str(path), data, SelectionConfig(**selection))
    cut = source.plan_clips()
    return cut, [source.read(span, "0") for span in cut.spans]


def stamped(path: Path, stamps: list[int], picture: Callable, last_ms: int = 0) -> Path:
    """Numbered frames with the given times in milliseconds, in any order; the last is shown for `last_ms`."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuvj420p"
        stream.time_base = Fraction(1, 1000)
        packets = []
        for number in range(len(stamps)):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            packets += stream.encode(frame)
        for number, packet in enumerate([*packets, *stream.encode()]):
            packet.pts, packet.time_base = stamps[number], Fraction(1, 1000)
            packet.dts = min(stamps[number:])
            packet.duration = last_ms if last_ms and number == len(stamps) - 1 else 0
            packet.stream = stream
            file.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.ts", "a.mp4", "a.mkv", "a.flv", "a.mov"])
def test_no_clip_is_of_a_hole_and_the_next_begins_behind_it(tmp_path: Path, write, number_of, on_screen, name: str):
    path = write(tmp_path / name, HOLE, b_frames=0)
    cut, found = clips(path)
    assert [span.start_s for span in cut.spans] == pytest.approx([0, 1, 2, 63, 64, 65], abs=2e-3)
    for span, clip in zip(cut.spans, found, strict=True):
        assert [number_of(frame) for frame in clip.frames] == on_screen(HOLE, span.start_s + np.arange(8) / 8)
    assert cut.remark == "holes: no clips of 1 hole in its timestamps, 60.0 s in all"


def test_a_hole_in_a_video_with_b_frames_is_found(tmp_path: Path, write):
    path = write(tmp_path / "a.mkv", HOLE, b_frames=3)
    assert [span.start_s for span in clips(path)[0].spans] == pytest.approx([0, 1, 2, 63, 64, 65], abs=2e-3)


def test_a_single_clip_is_of_frames_that_move(tmp_path: Path, write, number_of):
    """A recording that stands still for a minute, then goes on."""
    times = np.r_[np.arange(8), np.arange(48) + 960 + 8] / 16
    cut, found = clips(write(tmp_path / "a.mp4", times, b_frames=0), DATA.model_copy(update={"stride_s": 0.0}))
    assert [span.start_s for span in cut.spans] == pytest.approx([60.5], abs=2e-3)
    assert [number_of(frame) for frame in found[0].frames] == list(range(8, 24, 2))


def test_a_last_frame_that_stands_long_gives_no_clips(tmp_path: Path, picture):
    path = stamped(tmp_path / "a.mp4", list(range(0, 2000, 50)), picture, last_ms=30000)
    assert read_header(str(path)).container_duration_s == pytest.approx(32, abs=0.1)
    cut, _ = clips(path)
    assert [span.start_s for span in cut.spans] == [0.0, 1.0]
    assert "1 hole" in cut.remark


def test_a_video_of_which_no_stretch_is_long_enough_says_so(tmp_path: Path, picture):
    stamps = [minute * 60000 + step * 50 for minute in range(3) for step in range(10)]
    with pytest.raises(ClipError, match="has 3 stretches between holes, the longest of 0.55 s") as error:
        clips(stamped(tmp_path / "a.mkv", stamps, picture))
    assert error.value.reason == "too_short"


def test_a_slow_video_has_no_holes(tmp_path: Path, picture, number_of):
    cut, found = clips(stamped(tmp_path / "a.mkv", list(range(0, 10000, 2000)), picture))
    assert cut.remark == ""
    assert len(found) >= 8
    assert number_of(found[5].frames[0]) == 2


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov"])
def test_a_frame_is_shown_until_the_next_ones_time(tmp_path: Path, picture, number_of, on_screen, name: str):
    stamps = [0, 100, 200, 3000, 3100, 3200, 6000, 6100]
    path = stamped(tmp_path / name, stamps, picture)
    _, found = clips(path, DataConfig(frames=12, fps=2.0, height=64, width=128))
    expected = on_screen(np.array(stamps) / 1000, np.arange(12) / 2)
    assert [number_of(frame) for frame in found[0].frames] == expected


def test_of_frames_that_share_a_time_the_last_is_shown(tmp_path: Path, picture, number_of):
    path = stamped(tmp_path / "a.mkv", [0, 100, 200, 200, 300, 400, 400, 400, 500, 600, 700, 800, 900], picture)
    data = DataConfig(frames=10, fps=10.0, height=64, width=128)
    assert [number_of(frame) for frame in clips(path, data)[1][0].frames] == [0, 1, 3, 4, 7, 8, 9, 10, 11, 12]


def test_a_late_frame_shifts_none_of_those_that_follow(tmp_path: Path, picture, number_of):
    path = stamped(tmp_path / "a.mkv", [0, 100, 250, 200, 300, 400, 500, 600, 700, 800, 900], picture)
    data = DataConfig(frames=10, fps=10.0, height=64, width=128)
    numbers = [number_of(frame) for frame in clips(path, data)[1][0].frames]
    assert numbers[:2] == [0, 1]
    assert numbers[3:] == [4, 5, 6, 7, 8, 9, 10]


def test_joined_recordings_are_read_one_after_the_other(tmp_path: Path, write, number_of):
    """The second part's timestamps begin anew; no seek may be trusted, and no frame may be lost or shown twice."""
    times = np.arange(64) / 16
    parts = [
        write(tmp_path / "1.ts", times, b_frames=2),
        write(tmp_path / "2.ts", times, b_frames=2, pictures=lambda i: numbered(i + 64)),
    ]
    path = tmp_path / "a.ts"
    path.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
    source = Source(str(path), DATA, SelectionConfig())
    assert source.timeline().jumps_back
    assert source.timeline().end == pytest.approx(8.0, abs=0.1)
    _, found = clips(path)
    numbers = [[number_of(frame) for frame in clip.frames] for clip in found]
    assert len(numbers) == 8
    assert numbers[:3] == [list(range(16 * k, 16 * k + 16, 2)) for k in range(3)]
    assert all(np.diff(clip).tolist() == [2] * 7 for clip in numbers[4:])


def numbered(number: int) -> np.ndarray:
    bars = [235 if number >> (7 - bit) & 1 else 20 for bit in range(8)]
    return np.broadcast_to(np.repeat(np.array(bars, np.uint8), 16)[None, :, None], (64, 128, 3)).copy()


@pytest.mark.parametrize("name", ["a.mkv", "a.flv", "a.ts", "a.mp4", "a.nut"])
@pytest.mark.parametrize("late_s", [0.5, 10.0, 3600.0])
def test_a_late_start_makes_a_video_no_longer(tmp_path: Path, write, number_of, name: str, late_s: float):
    times = np.arange(40) / 16
    path = write(tmp_path / name, times + late_s, b_frames=0)
    cut, found = clips(path)
    assert cut.seconds == pytest.approx(2.47, abs=0.04)
    assert [span.start_s for span in cut.spans] == [0.0, 1.0]
    assert [number_of(frame) for frame in found[1].frames] == list(range(16, 32, 2))


def test_the_clock_of_a_transport_stream_may_overflow(tmp_path: Path, write, number_of):
    """Its 33 bits last 26.5 hours."""
    times = np.arange(64) / 16
    path = write(tmp_path / "a.ts", times + 2**33 / 90000 - 2.0 - 1.4, b_frames=2)
    cut, found = clips(path)
    assert cut.seconds == pytest.approx(4.0, abs=0.01)
    assert cut.remark == ""
    numbers = [[number_of(frame) for frame in clip.frames] for clip in found]
    assert numbers == [list(range(16 * k, 16 * k + 16, 2)) for k in range(4)]


def test_the_timeline_of_a_whole_video_is_that_of_its_frames(shared: Path):
    for name in ("bbb_432_433.webm", "flower.mp4", "mdn_frog.webm", "derived/vfr_frog.mp4"):
        path = str(shared / "data/clips" / name)
        with av.open(path) as file:
            stamps = [frame.time for frame in file.decode(video=0) if frame.time is not None]
        timeline = read_timeline(path, read_header(path), hole_s=1.0)
        assert timeline.start_s == pytest.approx(stamps[0])
        assert stamps[-1] - stamps[0] < timeline.end < stamps[-1] - stamps[0] + 0.3, name
        assert not timeline.holes
        assert not timeline.jumps_back
