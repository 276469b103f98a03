"""decord against PyAV: the same frames to the last bit, or none."""

import _ctypes
import random
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.reasons import ClipError
from data_prep.video import clips
from data_prep.video.clips import Source
from data_prep.video.decord_reader import DecordReader, NotOrdinaryError, PacketCheck
from data_prep.video.probe import read_header
from data_prep.video.readers import PyAvReader
from data_prep.video.timeline import read_timeline
from sora_train.data.config import DataConfig, SelectionConfig

STEADY = np.arange(40) / 30
UNEVEN = np.cumsum(np.r_[0, np.tile([0.01, 0.09, 0.03, 0.2], 8)])
OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0"}
BT709 = {"x264-params": "colorprim=bt709:transfer=bt709:colormatrix=bt709"}
ORDINARY = {
    "b_frames": {},
    "no_b_frames": {"b_frames": 0},
    "open_gop": {"options": OPEN_GOP},
    "many_references": {"options": {"x264-params": "ref=8:bframes=8:b-pyramid=normal:b-adapt=0:keyint=30"}},
    "intra_only": {"gop": 1},
    "slices": {"options": {"x264-params": "slices=4"}},
    "baseline": {"options": {"profile": "baseline"}},
    "uneven": {"times": UNEVEN},
    "slow": {"times": np.arange(12) / 2.7},
    "fast": {"times": np.arange(90) / 60},
    "late": {"times": STEADY + 3},
    "odd_size": {"size": (202, 118)},
    "not_square": {"pixel_aspect": 2},
    "bt709": {"options": BT709},
    "bt601": {"options": {"x264-params": "colorprim=smpte170m:transfer=smpte170m:colormatrix=smpte170m"}},
    "full_range": {"pix_fmt": "yuvj420p"},
    "chroma_at_the_top": {"options": {"x264-params": "chromaloc=2"}},
    "hd": {"size": (1280, 96), "times": STEADY[:12], "options": BT709},
}
OTHERS = {
    "turned": ("a.mp4", "libx264", {"rotation": 90}),
    "ten_bits": ("a.mp4", "libx264", {"pix_fmt": "yuv420p10le"}),
    "full_chroma": ("a.mp4", "libx264", {"pix_fmt": "yuv444p"}),
    "interlaced": ("a.mp4", "libx264", {"options": {"x264-params": "tff=1"}}),
    "bt2020": ("a.mp4", "libx264", {"options": {"x264-params": "colormatrix=bt2020nc"}}),
    "hd_without_a_matrix": ("a.mp4", "libx264", {"size": (1280, 64)}),
    "hevc": ("a.mp4", "libx265", {"options": {"x265-params": "log-level=none"}}),
    "vp9": ("a.mkv", "libvpx-vp9", {}),
    "avi": ("a.avi", "libx264", {}),
    "transport_stream": ("a.ts", "libx264", {}),
    "parameters_in_the_stream": ("a.mkv", "libx264", {"options": {"x264-params": "repeat-headers=1"}}),
    "narrow": ("a.mp4", "libx264", {"size": (48, 64)}),
    "one_frame": ("a.mp4", "libx264", {"times": STEADY[:1]}),
}


def texture(number: int, width: int, height: int) -> np.ndarray:
    """A moving texture under noise, so that every picture takes thousands of bytes."""
    fine = np.random.default_rng(0).integers(0, 200, (height, width, 3), np.uint8)
    return np.roll(fine, 3 * number, axis=1) + np.random.default_rng(number).integers(0, 56, fine.shape, np.uint8)


def drawn(write, path: Path, codec: str = "libx264", times: np.ndarray = STEADY, size=(128, 64), **how) -> Path:
    return write(path, times, codec, size=size, pictures=lambda number: texture(number, *size), **how)


def by(reader: type, path: Path, due: np.ndarray) -> list[np.ndarray]:
    name, header = str(path), read_header(str(path))
    if reader is PyAvReader:
        return PyAvReader(name, header).frames(due, lambda frame: frame)
    packets = PacketCheck(header)
    read_timeline(name, header, on_packet=packets.add)
    return DecordReader(name, header, packets.times()).frames(due, lambda frame: frame)


@pytest.mark.parametrize(  # FFmpeg has one muxer and one demuxer for mp4 and mov
    ("container", "feature"), [*product(("mp4", "mkv"), ORDINARY), ("mov", "b_frames")]
)
def test_an_ordinary_videos_frames_are_pyavs(tmp_path: Path, write, container: str, feature: str):
    path = drawn(write, tmp_path / f"a.{container}", **ORDINARY[feature])
    times = np.array(ORDINARY[feature].get("times", STEADY))
    length = times[-1] - times[0]
    for due in (times[:-1] - times[0], np.arange(0, length, 1 / 7), length / 2 + np.arange(0, length / 2, 1 / 50)[:-1]):
        np.testing.assert_array_equal(by(DecordReader, path, due), by(PyAvReader, path, due))


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_ordinary_is_left_to_pyav(tmp_path: Path, write, kind: str):
    name, codec, how = OTHERS[kind]
    path = drawn(write, tmp_path / name, codec, **how)
    with pytest.raises(NotOrdinaryError):
        by(DecordReader, path, np.arange(4) / 30)


def test_what_would_fill_the_memory_is_left_to_pyav(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch):
    path = drawn(write, tmp_path / "a.mp4")
    monkeypatch.setattr("data_prep.video.decord_reader.AHEAD_BYTES", 39 * 128 * 64 * 3)
    with pytest.raises(NotOrdinaryError, match="more than 39 frames"):
        by(DecordReader, path, np.arange(4) / 30)


def test_a_cut_file_is_left_to_pyav(tmp_path: Path, write, cut_to_second_keyframe):
    """Copied from its second keyframe on, it begins with pictures that refer to the group before."""
    whole = drawn(write, tmp_path / "whole.mp4", options=OPEN_GOP)
    path = cut_to_second_keyframe(whole, tmp_path / "cut.mp4")
    with pytest.raises(NotOrdinaryError):
        by(DecordReader, path, np.arange(4) / 30)


def harmed(content: bytes, packets: list[tuple[int, int]], drawn: random.Random) -> bytes:
    """A copy with random damage to one packet."""
    place, size = drawn.choice(packets)
    length = drawn.choice((1, 1, 2, 16, min(size, 400)))
    at = place + drawn.randrange(size - length + 1)
    if drawn.random() < 0.3:
        at = place + drawn.randrange(8)  # headers
    harm = drawn.choice((bytes(length), b"\xff" * length, drawn.randbytes(length)))
    return content[:at] + harm + content[at + length :]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("a.mkv", {"bf": "0"}),
        ("cavlc.mp4", {"x264-params": "cabac=0:keyint=15"}),
        ("slices.mp4", {"x264-params": "slices=4:keyint=15"}),
        ("open.mkv", OPEN_GOP),
        ("intra.mp4", {"x264-params": "keyint=1"}),
    ],
)
def test_no_damage_that_pyav_reports_passes_through_decord(tmp_path: Path, write, capfd, name: str, options: dict):
    path, bad, due = drawn(write, tmp_path / name, options=options), tmp_path / f"bad_{name}", np.arange(29) / 30
    with av.open(str(path)) as file:
        packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    content, chance = path.read_bytes(), random.Random(0)
    reported, passed = 0, 0
    for _ in range(60):
        bad.write_bytes(harmed(content, packets, chance))
        try:
            by(PyAvReader, bad, due)
            continue
        except ClipError as error:
            reported += error.reason == "corrupt"
        try:
            by(DecordReader, bad, due)
            passed += 1
        except NotOrdinaryError:
            pass
    assert reported > 20
    assert passed == 0
    assert capfd.readouterr().err == ""


def test_a_sources_only_clip_is_read_by_decord(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch):
    path = drawn(write, tmp_path / "a.mp4")
    data = DataConfig(frames=8, fps=8, height=32, width=64)
    source = Source(str(path), data, SelectionConfig())
    clip = source.read(source.plan_clips().spans[0], "0")
    assert source.reader().file is None  # PyAV's reader has opened nothing
    monkeypatch.setattr(clips, "DecordReader", refusing)
    source = Source(str(path), data, SelectionConfig())
    np.testing.assert_array_equal(source.read(source.plan_clips().spans[0], "0").frames, clip.frames)
    assert source.reader().file is not None


def refusing(path: str, header: object, times: object) -> None:
    raise NotOrdinaryError("refused here")


def test_of_the_76_clips_decord_gives_what_pyav_gives(shared: Path):
    folder, due = shared / "data" / "clips", np.arange(8) / 8
    files = sorted(path for path in folder.rglob("*.*") if path.suffix != ".csv")
    read = 0
    for path in files:
        try:
            frames = by(DecordReader, path, due)
        except NotOrdinaryError:
            continue
        np.testing.assert_array_equal(frames, by(PyAvReader, path, due), path.name)
        read += 1
    assert (read, len(files)) == (37, 76)


def test_decords_libraries_are_its_own(tmp_path: Path):
    """Were they loaded for all, PyAV would call decord's FFmpeg; and CUDA's take gigabytes."""
    cuda = tmp_path / "nvidia" / "cuda" / "lib"
    cuda.mkdir(parents=True)
    shutil.copy(_ctypes.__file__, cuda / "libfake.so")
    script = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import data_prep.video.decord_reader, ctypes\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('libdecord' in maps, 'libfake' in maps, hasattr(ctypes.CDLL(None), 'avcodec_version'))\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "False", "False"]
