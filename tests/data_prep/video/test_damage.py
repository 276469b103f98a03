"""Damage that decoders conceal: no damaged frame is given, and a clip before or after it is."""

import random
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.reasons import ClipError
from data_prep.video.clips import Source
from data_prep.video.probe import read_header
from data_prep.video.readers import PyAvReader
from sora_train.data.config import DataConfig, SelectionConfig

TIMES, GOP = np.arange(60) / 30, 15
CODECS = {
    "h264.mp4": ("libx264", {}),
    "h264.mkv": ("libx264", {"bf": "0"}),
    "h264.avi": ("libx264", {"bf": "0"}),
    "open.mp4": ("libx264", {"x264-params": f"open-gop=1:bframes=3:keyint={GOP}:scenecut=0"}),
    "hevc.mp4": ("libx265", {"x265-params": f"log-level=none:keyint={GOP}:bframes=0"}),
    "mpeg4.avi": ("mpeg4", {"qscale": "3"}),
    "mpeg2.mkv": ("mpeg2video", {"qscale": "3"}),
    "vp9.webm": ("libvpx-vp9", {"b": "3M", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}),
    "vp8.webm": ("libvpx", {"b": "3M", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "crf": "20", "svtav1-params": "pred-struct=1"}),
    "mjpeg.avi": ("mjpeg", {"qscale": "3"}),
    "ffv1.mkv": ("ffv1", {"level": "3", "slicecrc": "1"}),
    "png.mov": ("png", {}),
}
PIX_FMT = {"mjpeg": "yuvj420p", "png": "rgb24"}


def texture(number: int) -> np.ndarray:
    """A moving texture under noise, so that every picture takes thousands of bytes."""
    fine = np.random.default_rng(0).integers(0, 200, (128, 192, 3), np.uint8)
    return np.roll(fine, 3 * number, axis=1) + np.random.default_rng(number).integers(0, 56, fine.shape, np.uint8)


def damaged(path: Path, number: int, name: str) -> Path:
    """A copy whose packet `number` in the file's order has a hole from its third to its end."""
    with av.open(str(path)) as file:
        place, size = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size][number]
    content = bytearray(path.read_bytes())
    content[place + size // 3 : place + size] = bytes(size - size // 3)
    copy = path.with_name(name)
    copy.write_bytes(content)
    return copy


def frames(path: Path, due: np.ndarray) -> np.ndarray:
    return np.stack(PyAvReader(str(path), read_header(str(path))).frames(due, lambda frame: frame))


@pytest.mark.parametrize("name", CODECS)
def test_a_hole_costs_the_clips_that_show_it_and_no_others(tmp_path: Path, write, name: str):
    codec, options = CODECS[name]
    path = write(tmp_path / name, TIMES, codec, size=(192, 128), gop=GOP, options=options, pictures=texture,
                 pix_fmt=PIX_FMT.get(codec, "yuv420p"))  # fmt: skip
    bad = damaged(path, GOP + 5, f"bad_{name}")
    early, late = np.arange(9) / 30, 1.1 + np.arange(9) / 10  # the third group of pictures begins at 1 s
    for due in (early, late):
        np.testing.assert_array_equal(frames(bad, due), frames(path, due))
    with pytest.raises(ClipError, match=r"decoding fails at 0\.\d\d s") as error:
        frames(bad, np.arange(30) / 30)
    assert error.value.reason == "corrupt"


@pytest.mark.parametrize("name", ["h264.ts", "hevc.ts", "mpeg2.ts"])
def test_clips_with_lost_packets_are_corrupt(tmp_path: Path, write, name: str):
    """One packet of 188 bytes in eighty is lost, as in a broadcast."""
    codec, options = {
        "h264.ts": ("libx264", {}),
        "hevc.ts": ("libx265", {"x265-params": f"log-level=none:keyint={GOP}"}),
        "mpeg2.ts": ("mpeg2video", {"qscale": "3"}),
    }[name]
    path = write(tmp_path / name, TIMES, codec, size=(192, 128), gop=GOP, options=options, pictures=texture)
    content = path.read_bytes()
    packets = [content[place : place + 188] for place in range(0, len(content), 188)]
    drawn = random.Random(0)
    bad = tmp_path / f"bad_{name}"
    bad.write_bytes(b"".join(p for i, p in enumerate(packets) if i < 20 or drawn.random() > 1 / 80))
    with pytest.raises(ClipError) as error:
        frames(bad, np.arange(55) / 30)
    assert error.value.reason == "corrupt"


def test_nothing_is_found_wrong_with_real_videos(shared: Path):
    data = DataConfig(frames=8, fps=8, height=64, width=64)
    files = [*(shared / "data" / "clips").glob("*.*"), *(shared / "data" / "clips" / "derived").glob("*.*")]
    reasons = {}
    for path in sorted(path for path in files if path.suffix != ".csv"):
        source = Source(str(path), data, SelectionConfig())
        try:
            source.read(source.plan_clips().spans[0], "")
        except ClipError as error:
            reasons[path.name] = error.reason
    assert set(reasons.values()) <= {"too_short"}, reasons


def test_a_broken_file_has_the_reason_that_its_list_says(shared: Path):
    """Of shared/data/broken/manifest.csv."""
    expected = {
        "audio_only.mp4": "no_video_stream",
        "corrupt_mdat.mp4": "corrupt",
        "html_404.webm": "unreadable",
        "huge_dims_header.mp4": "too_large",
        "only_ftyp.mp4": "unreadable",
        "random_bytes.mp4": "unreadable",
        "text_renamed.mp4": "unreadable",
        "truncated_60pct.mp4": "truncated",
        "truncated_no_moov.mp4": "unreadable",
        "truncated.mkv": "truncated",
        "wrong_extension_gif.mp4": "",
        "wrong_extension_webm.avi": "",
    }
    found = {}
    for name in expected:
        data = DataConfig(frames=8, fps=2 if expected[name] == "truncated" and name.endswith("mp4") else 4)
        path = str(shared / "data" / "broken" / name)
        try:
            source = Source(path, data, SelectionConfig())
            source.read(source.plan_clips().spans[0], "")
            found[name] = ""
        except ClipError as error:
            found[name] = error.reason
    assert found == expected
