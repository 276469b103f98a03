"""Every way in which a file says how it is turned and mirrored, against the same picture turned by NumPy."""

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.video.clips import Source
from data_prep.video.probe import read_header
from data_prep.video.readers import PyAvReader
from sora_train.data.config import DataConfig, SelectionConfig

HEIGHT, WIDTH = 64, 128
EIGHT: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "upright": ((1, 0, 0, 1), lambda x: x),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "upside down": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "transposed across": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
    "counterclockwise": ((0, -1, 1, 0), lambda x: np.rot90(x)),
}
"""What a display matrix `a b c d` does; a pixel at x, y goes to a x + c y, b x + d y, and y points down."""
EXIF = ["upright", "mirrored", "half a turn", "upside down", "transposed", "clockwise", "transposed across"]
EXIF += ["counterclockwise"]  # in the order of EXIF's numbers, 1 to 8


def corners(_: int = 0) -> np.ndarray:
    """A picture whose corners are red, green, blue and black."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:32, :64, 0] = image[:32, 64:, 1] = image[32:, :64, 2] = 220
    return image


def check(path: Path, name: str) -> None:
    """That the file's first frame, its header and its clip are oriented as named."""
    expected = EIGHT[name][1](corners())
    header = read_header(str(path))
    assert header.display_size == expected.shape[1::-1]
    frame = PyAvReader(str(path), header).frames(np.zeros(1), lambda frame: frame)[0]
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 20
    data = DataConfig(buckets=(f"4x{HEIGHT}x{WIDTH}", f"4x{WIDTH}x{HEIGHT}"), fps=8.0)
    source = Source(str(path), data, SelectionConfig())
    clip = source.read(source.plan_clips().spans[0], "0").frames
    assert clip.shape[1:] == expected.shape
    assert np.abs(clip.astype(int) - expected).mean() < 20


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize(
    ("file", "codec", "box"),
    [
        ("a.mp4", "libx264", b"tkhd"),
        ("a.mp4", "libx264", b"mvhd"),
        ("a.mov", "mjpeg", b"tkhd"),
        ("a.3gp", "mpeg4", b"tkhd"),
        ("a.mp4", "libsvtav1", b"tkhd"),
    ],
)
def test_the_matrix_of_an_mp4_is_applied(tmp_path: Path, write, name: str, file: str, codec: str, box: bytes):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write(tmp_path / file, np.arange(15) / 30, codec, pictures=corners, pix_fmt=pix_fmt)
    content = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in EIGHT[name][0])
    place = content.index(box) + (44 if box == b"tkhd" else 40)  # both boxes are of version 0
    struct.pack_into(">9i", content, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    check(path, name)


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize(("file", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.webm", "libvpx-vp9")])
def test_the_projection_of_a_matroska_file_is_applied(tmp_path: Path, write, name: str, file: str, codec: str):
    """FFmpeg writes a matrix as a roll, and mirroring as half a turn of yaw."""
    a, b, c, d = (value << 16 for value in EIGHT[name][0])
    path = write(tmp_path / file, np.arange(15) / 30, codec, pictures=corners, matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    check(path, name)


def sei_of(name: str) -> tuple[int, bool, bool]:
    """Degrees counterclockwise after mirroring left and right, and top and bottom: H.274, 8.5.2."""
    return {
        "upright": (0, False, False),
        "mirrored": (0, True, False),
        "half a turn": (180, False, False),
        "upside down": (0, False, True),
        "transposed": (90, True, False),
        "clockwise": (270, False, False),
        "transposed across": (270, True, False),
        "counterclockwise": (90, False, False),
    }[name]


def display_orientation(codec: str, name: str) -> bytes:
    """A NAL unit with one SEI message: H.264 7.3.1, H.265 7.3.1.2, H.274 8.5.1."""
    degrees, mirrored, upside_down = sei_of(name)
    end = "0101" if codec == "libx264" else "1"  # repetition period 1, no extension; persistence; then a bit to align
    bits = f"0{mirrored:d}{upside_down:d}{degrees * 65536 // 360:016b}{end}"
    content = int((bits + "1" * (len(bits) < 24)).ljust(24, "0"), 2).to_bytes(3, "big")
    message = bytes([47, 3]) + content.replace(b"\0\0\0", b"\0\0\3\0") + b"\x80"
    return (b"\6" if codec == "libx264" else bytes([39 << 1, 1])) + message


def with_sei(source: Path, target: Path, codec: str, names: list[str]) -> Path:
    """A copy whose keyframes carry a display orientation, the first of `names` first."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        out = new.add_stream_from_template(stream)
        remaining = iter(names)
        for packet in old.demux(stream):
            if not packet.size:
                continue
            unit = display_orientation(codec, next(remaining)) if packet.is_keyframe else b""
            prefix = b"\0\0\1" if source.suffix == ".ts" else len(unit).to_bytes(4, "big")
            changed = av.Packet((prefix + unit if unit else b"") + bytes(packet))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, out
            new.mux(changed)
    return target


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("file", ["a.mp4", "a.mkv", "a.ts", "a.flv"])
def test_a_display_orientation_message_is_applied(tmp_path: Path, write, name: str, codec: str, file: str):
    kind = "ts" if file == "a.ts" else "mp4"  # its NAL units are written otherwise
    options = {"x265-params": "log-level=none:bframes=0"} if codec == "libx265" else {}
    path = write(tmp_path / f"plain.{kind}", np.arange(15) / 30, codec, gop=15, options=options, pictures=corners)
    check(with_sei(path, tmp_path / file, codec, [name, name]), name)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("file", ["a.avi", "a.mov"])
def test_the_exif_orientation_of_motion_jpeg_is_applied(tmp_path: Path, number: int, file: str):
    """Cameras of stills write it into each picture."""
    exif = Image.Exif()
    exif[0x0112] = number
    Image.fromarray(corners()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with av.open(str(tmp_path / file), "w") as target:
        out = target.add_stream("mjpeg", rate=30)
        out.width, out.height, out.pix_fmt, out.time_base = WIDTH, HEIGHT, "yuvj420p", Fraction(1, 30)
        for time in range(15):
            packet = av.Packet((tmp_path / "a.jpg").read_bytes())
            packet.pts = packet.dts = time
            packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, 30), True, out
            target.mux(packet)
    check(tmp_path / file, EXIF[number - 1])


def test_an_orientation_message_holds_until_the_next_keyframe(tmp_path: Path, write):
    """A telephone that is turned while it films."""
    path = write(tmp_path / "plain.mp4", np.arange(24) / 24, gop=12, b_frames=0, pictures=corners)
    turned = str(with_sei(path, tmp_path / "a.mp4", "libx264", ["counterclockwise", "half a turn"]))
    frames = PyAvReader(turned, read_header(turned)).frames(np.arange(24) / 24, lambda frame: frame)
    for number, frame in enumerate(frames):
        expected = np.rot90(corners(), 1 if number < 12 else 2)
        assert frame.shape == expected.shape, number
        assert np.abs(frame.astype(int) - expected).mean() < 20, number


@pytest.mark.parametrize("name", EIGHT)
def test_the_pixel_aspect_applies_before_rotation(tmp_path: Path, write, name: str):
    a, b, c, d = (value << 16 for value in EIGHT[name][0])
    path = write(
        tmp_path / "a.mp4",
        np.arange(15) / 30,
        pixel_aspect=Fraction(2),
        pictures=corners,
        matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30),
    )
    expected = EIGHT[name][1](corners().repeat(2, 1))
    assert read_header(str(path)).display_size == expected.shape[1::-1]
    data = DataConfig(buckets=("4x64x256", "4x256x64"), fps=8.0)
    source = Source(str(path), data, SelectionConfig())
    clip = source.read(source.plan_clips().spans[0], "0").frames
    assert clip.shape[1:] == expected.shape
    assert np.abs(clip.astype(int) - expected).mean() < 20
