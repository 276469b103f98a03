"""Colours against closed forms: patches of known light, and what they are in sRGB."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace

from data_prep.reasons import remark_kinds
from data_prep.video.clips import Source
from sora_train.data.config import DataConfig, SelectionConfig

DATA = DataConfig(frames=4, fps=8, height=64, width=128)
PQ, HLG = "smpte2084", "arib-std-b67"


def film(path: Path, patches: list[tuple], matrix: Colorspace, size=(128, 64), codec="libx265", **tags: str) -> Path:
    """A video of vertical patches, colours from 0 to 1, coded by a matrix and tagged as is said."""
    width, height = size
    image = np.zeros((height, width, 3), np.uint16)
    for number, patch in enumerate(np.array_split(np.arange(width), len(patches))):
        image[:, patch] = np.round(np.array(patches[number]) * 65535).astype(np.uint16)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p10le" if codec == "libx265" else "yuv420p"
        said = ":".join(f"{name}={value}" for name, value in tags.items())
        stream.options = (
            {"x265-params": f"log-level=none:qp=2:{said}".rstrip(":")} if codec == "libx265" else {"qp": "2"}
        )
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(image, format="rgb48le")
            file.mux(stream.encode(frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix)))
        file.mux(stream.encode())
    return path


def read(path: Path, patches: int) -> tuple[np.ndarray, list[str]]:
    """The colours of the patches' middles, and the remarks."""
    source = Source(str(path), DATA, SelectionConfig())
    cut = source.plan_clips()
    clip = source.read(cut.spans[0], "")
    assert remark_kinds(cut.remark) == remark_kinds(clip.remark)
    columns = [int(128 * (number + 0.5) / patches) for number in range(patches)]
    return clip.frames[2, 32, columns].astype(int), remark_kinds(clip.remark)


def srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def pq(light: np.ndarray) -> np.ndarray:
    """The code of so many cd/m2: SMPTE ST 2084."""
    y = (np.asarray(light) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def test_pq_is_shown_with_its_reference_white_as_white(tmp_path: Path):
    light = np.array([0.0, 10.0, 26.0, 100.0, 203.0, 1000.0])
    tags = {"colorprim": "bt2020", "transfer": PQ, "colormatrix": "bt2020nc"}
    found, remarks = read(film(tmp_path / "a.mp4", [(v,) * 3 for v in pq(light)], Colorspace.BT2020, **tags), 6)
    assert remarks == ["hdr"]
    assert np.abs(found - srgb(light / 203)[:, None]).max() <= 4


def test_saturated_colours_of_hdr_are_those_that_were_meant(tmp_path: Path):
    """BT.2087, equation 4: BT.709 in BT.2020."""
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    colours = np.array([(1.0, 0.1, 0.1), (0.1, 0.9, 0.1), (0.1, 0.1, 0.8), (0.6, 0.5, 0.05)])  # linear, BT.709
    tags = {"colorprim": "bt2020", "transfer": PQ, "colormatrix": "bt2020nc"}
    patches = [tuple(patch) for patch in pq(203 * colours @ to_2020.T)]
    found, _ = read(film(tmp_path / "a.mp4", patches, Colorspace.BT2020, **tags), 4)
    assert np.abs(found - srgb(colours)).max() <= 5


def test_hlg_is_shown_with_its_reference_white_as_white(tmp_path: Path):
    """At a peak of 1000 cd/m2: ITU-R BT.2100, table 5; 75 % is reference white, BT.2408."""
    codes = np.array([0.0, 0.25, 0.38, 0.5, 0.75])
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)
    tags = {"colorprim": "bt2020", "transfer": HLG, "colormatrix": "bt2020nc"}
    found, remarks = read(film(tmp_path / "a.mp4", [(v,) * 3 for v in codes], Colorspace.BT2020, **tags), 5)
    assert remarks == ["hdr"]
    assert np.abs(found - srgb(1000 * scene**1.2 / 203)[:, None]).max() <= 6


def test_a_wide_gamut_is_taken_to_that_of_srgb(tmp_path: Path):
    """P3 by SMPTE EG 432-1 to BT.709, both with D65; colours outside are clipped."""
    to_709 = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])
    patches = [(0.5, 0.5, 0.5), (0.6, 0.4, 0.4), (0.4, 0.6, 0.5), (0.5, 0.5, 0.7)]
    linear = np.array(patches) ** 2.4  # as a display shows BT.709's code: BT.1886
    tags = {"colorprim": "smpte432", "transfer": "bt709", "colormatrix": "bt709"}
    found, remarks = read(film(tmp_path / "a.mp4", patches, Colorspace.ITU709, **tags), 4)
    assert remarks == ["wide_gamut"]
    assert np.abs(found - 255 * np.clip(linear @ to_709.T, 0, 1) ** (1 / 2.4)).max() <= 3


@pytest.mark.parametrize(
    ("size", "matrix", "tags"),
    [
        ((1280, 640), Colorspace.ITU709, {}),
        ((640, 640), Colorspace.ITU709, {}),
        ((640, 320), Colorspace.ITU601, {}),
        ((640, 320), Colorspace.ITU709, {"colormatrix": "bt709"}),
        ((1280, 640), Colorspace.ITU601, {"colormatrix": "bt470bg"}),
    ],
)
def test_without_a_tag_hd_is_bt709_and_the_rest_bt601(tmp_path: Path, size, matrix, tags):
    patches = [(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8), (0.5, 0.5, 0.5)]
    found, remarks = read(film(tmp_path / "a.mp4", patches, matrix, size, **tags), 4)
    assert remarks == []
    assert np.abs(found - 255 * np.array(patches)).max() <= 3


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("a.mp4", "libx264", {"x264-params": "tff=1"}), ("a.mpg", "mpeg2video", {"flags": "+ildct+ilme"})],
)
def test_an_interlaced_video_has_a_remark(tmp_path: Path, write, name: str, codec: str, options: dict[str, str]):
    path = write(tmp_path / name, np.arange(30) / 30, codec, options=options)
    source = Source(str(path), DATA, SelectionConfig())
    assert remark_kinds(source.plan_clips().remark) == ["interlaced"]


def test_the_assumed_rate_of_a_raw_stream_has_a_remark(tmp_path: Path, write):
    source = Source(str(write(tmp_path / "a.h264", np.arange(60) / 30)), DATA, SelectionConfig())
    assert remark_kinds(source.plan_clips().remark) == ["no_timestamps"]
    assert "25 frames per second are assumed, though it says 30" in source.plan_clips().remark


def test_a_clean_aperture_has_a_remark(tmp_path: Path, write):
    """ISO/IEC 14496-12, 12.1.4."""
    path = write(tmp_path / "a.mp4", np.arange(30) / 30)
    source = Source(str(path), DATA, SelectionConfig())
    assert source.plan_clips().remark == ""
    content = path.read_bytes()
    box = b"\0\0\0\x28clap" + b"".join(number.to_bytes(4, "big") for number in (120, 1, 60, 1, 0, 1, 0, 1))
    place = content.index(b"avcC") - 4
    grown = bytearray(content[:place] + box + content[place:])
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        at = content.rindex(kind, 0, place) - 4
        grown[at : at + 4] = (int.from_bytes(grown[at : at + 4], "big") + len(box)).to_bytes(4, "big")
    path.write_bytes(grown)
    source = Source(str(path), DATA, SelectionConfig())
    assert remark_kinds(source.plan_clips().remark) == ["clean_aperture"]
    assert "of its 128x64 pixels 120x60 are to be shown" in source.plan_clips().remark
