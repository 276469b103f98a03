"""Every container and codec: exactly the frames asked for make a clip, and one frame less is too short."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.reasons import ClipError
from data_prep.video.clips import Source
from sora_train.data.config import DataConfig, SelectionConfig

KINDS = [
    ("a.mp4", "libx264", {}),
    ("a.mov", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ("a.mov", "qtrle", {"pix_fmt": "rgb24"}),
    ("a.mp4", "libx265", {"options": {"x265-params": "log-level=none"}}),
    ("a.mp4", "libsvtav1", {"options": {"preset": "12"}}),
    ("a.mp4", "libvpx-vp9", {}),
    ("a.mkv", "libx264", {}),
    ("a.mkv", "ffv1", {}),
    ("a.mkv", "mpeg2video", {"rate": 25}),
    ("a.webm", "libvpx", {}),
    ("a.webm", "libvpx-vp9", {}),
    ("a.webm", "libsvtav1", {"options": {"preset": "12"}}),
    ("a.avi", "mpeg4", {}),
    ("a.avi", "libx264", {}),
    ("a.avi", "msmpeg4", {}),
    ("a.avi", "huffyuv", {"pix_fmt": "rgb24"}),
    ("a.avi", "rawvideo", {}),
    ("a.ts", "libx264", {}),
    ("a.ts", "libx265", {"options": {"x265-params": "log-level=none"}}),
    ("a.ts", "mpeg2video", {"rate": 25}),
    ("a.m2ts", "libx264", {}),
    ("a.mpg", "mpeg2video", {"rate": 25}),
    ("a.mpg", "mpeg1video", {"rate": 25}),
    ("a.vob", "mpeg2video", {"rate": 25}),
    ("a.flv", "flv", {}),
    ("a.flv", "libx264", {}),
    ("a.flv", "libx265", {"options": {"x265-params": "log-level=none"}}),
    ("a.wmv", "wmv2", {}),
    ("a.wmv", "wmv1", {}),
    ("a.asf", "msmpeg4", {}),
    ("a.gif", "gif", {"pix_fmt": "rgb8", "rate": 20}),
    ("a.3gp", "h263", {"size": (128, 96)}),
    ("a.3g2", "libx264", {}),
    ("a.mxf", "mpeg2video", {"rate": 25}),
    ("a.ogv", "libvpx", {}),
    ("a.nut", "ffv1", {}),
    ("a.nut", "libx264", {}),
    ("a.rm", "rv20", {}),
    ("a.ivf", "libvpx-vp9", {}),
    ("a.wtv", "mpeg2video", {"rate": 25}),
]


def write_frames(
    path: Path,
    codec: str,
    count: int,
    picture,
    rate: int = 16,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (128, 64),
    options: dict[str, str] | None = None,
) -> None:
    """A video of so many frames at a steady rate, with the container's and the encoder's own choices for the rest."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.bit_rate, stream.codec_context.thread_count = 3_000_000, 1
        stream.codec_context.options = options or {}
        for number in range(count):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")))
        file.mux(stream.encode())


@pytest.mark.parametrize(("name", "codec", "keys"), KINDS, ids=[f"{name[2:]}-{codec}" for name, codec, _ in KINDS])
def test_exactly_enough_frames_are_enough_and_one_less_is_not(
    tmp_path: Path, picture, number_of, name: str, codec: str, keys: dict
):
    count = keys.get("rate", 16)
    data = DataConfig(frames=count, fps=count, height=64, width=128)
    write_frames(tmp_path / name, codec, count, picture, **keys)
    source = Source(str(tmp_path / name), data, SelectionConfig())
    frames = source.read(source.plan_clips().spans[0], "0").frames
    assert [number_of(frame) for frame in frames] == list(range(count))
    write_frames(tmp_path / name, codec, count - 1, picture, **keys)
    source = Source(str(tmp_path / name), data, SelectionConfig())
    with pytest.raises(ClipError) as error:
        source.read(source.plan_clips().spans[0], "0")
    assert error.value.reason == "too_short"


@pytest.mark.parametrize(
    ("name", "codec", "keys"),
    [
        ("a.nut", "ffv1", {"rate": 5}),
        ("a.mpg", "mpeg2video", {"rate": 25}),
        ("a.vob", "mpeg2video", {"rate": 25}),
        ("a.mjpeg", "mjpeg", {"rate": 25, "pix_fmt": "yuvj420p"}),
    ],
)
def test_the_last_of_several_clips_is_not_left_out(
    tmp_path: Path, picture, number_of, name: str, codec: str, keys: dict
):
    count = keys["rate"]
    write_frames(tmp_path / name, codec, 4 * count, picture, **keys)
    data = DataConfig(frames=count, fps=count, height=64, width=128, stride_s=1.0)
    source = Source(str(tmp_path / name), data, SelectionConfig())
    clips = [source.read(span, "0").frames for span in source.plan_clips().spans]
    assert [number_of(frame) for frames in clips for frame in frames] == list(range(4 * count))


def joined(folder: Path, name: str, codec: str, shapes: list[tuple[int, int]], pix_fmt: str = "yuv420p") -> Path:
    """One stream of several sizes: a circle of 40 pixels' radius in each, for two seconds."""
    with av.open(str(folder / name), "w") as target:
        out = target.add_stream(codec, rate=16)
        out.width, out.height, out.pix_fmt = *shapes[0], pix_fmt
        start = 0
        for number, (width, height) in enumerate(shapes):
            part = av.CodecContext.create(codec, "w")
            part.width, part.height, part.pix_fmt = width, height, pix_fmt
            part.time_base, part.framerate, part.bit_rate = Fraction(1, 16), Fraction(16), 3_000_000
            part.thread_count, part.max_b_frames, part.gop_size = 1, 0, 16
            y, x = np.mgrid[:height, :width]
            circle = (x - width / 2) ** 2 + (y - height / 2) ** 2 < 40**2
            image = np.where(circle[..., None], 235, 20 + 30 * number).astype(np.uint8).repeat(3, 2)
            packets = []
            for time in range(32):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, 16)
                packets += part.encode(frame)
            for packet in [*packets, *part.encode(None)]:
                packet.pts, packet.dts, packet.time_base = packet.pts + start, packet.dts + start, Fraction(1, 16)
                packet.stream = out
                target.mux(packet)
            start += 32
    return folder / name


@pytest.mark.parametrize("scene_cuts", [False, True])
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.ts", "libx264", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mp4", "libvpx-vp9", "yuv420p"),
    ],
)
def test_a_circle_stays_round_where_the_frame_size_changes(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, scene_cuts: bool
):
    shapes = [(256, 128), (128, 256), (256, 128)]
    path = joined(tmp_path, name, codec, shapes, pix_fmt)
    data = DataConfig(frames=8, fps=8.0, height=128, width=128, stride_s=1.0)
    source = Source(str(path), data, SelectionConfig(scene_cuts=scene_cuts))
    spans = source.plan_clips().spans
    assert [span.start_s for span in spans] == pytest.approx([0, 1, 2, 3, 4, 5], abs=2e-3)
    for span in spans:
        light = source.read(span, "0").frames[4][..., 0] > 160
        assert light.any(0).sum() == pytest.approx(light.any(1).sum(), abs=4), span.start_s
