"""Videos whose frames carry their own number, so a test can tell which frame it got."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

BITS = 8


def picture(number: int, width: int = 128, height: int = 64) -> np.ndarray:
    """A grey frame `H W 3`: the number as vertical bars, most significant bit at the left."""
    bars = [235 if number >> (BITS - 1 - bit) & 1 else 20 for bit in range(BITS)]
    frame = np.repeat(np.array(bars, np.uint8), width // BITS)[None, :, None]
    return np.broadcast_to(frame, (height, width, 3)).copy()


def number_of(frame: np.ndarray) -> int:
    """The number that a frame carries."""
    bars = np.array_split(frame.mean((0, 2)), BITS)
    return sum(
        int(bar[len(bar) // 4 : -len(bar) // 4].mean() > 127) << (BITS - 1 - bit) for bit, bar in enumerate(bars)
    )


def on_screen(times: np.ndarray, due: np.ndarray) -> list[int]:
    """Which frames a player shows at `due`: the last whose time has come. Containers may round to milliseconds."""
    return [int(np.flatnonzero(times <= moment + 1.5e-3)[-1]) for moment in due]


def write(
    path: Path,
    times: np.ndarray,
    codec: str = "libx264",
    size: tuple[int, int] = (128, 64),
    gop: int = 12,
    options: dict[str, str] | None = None,
    b_frames: int | None = None,
    rotation: int = 0,
    matrix: tuple[int, ...] | None = None,
    pixel_aspect: Fraction | None = None,
    pictures: Callable[[int], np.ndarray] | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """A video whose frame i is `picture(i)` (`i % 256` where there are more), shown at `times[i]` seconds.

    `rotation` is in degrees counter-clockwise, as FFmpeg has it, `matrix` a display matrix; `pictures` draws others
    than `picture`.
    """
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        context = stream.codec_context
        context.thread_count = 1
        context.options = options or {}
        if b_frames is not None:
            context.max_b_frames = b_frames
        if pixel_aspect:
            context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix:
            stream.set_display_matrix(matrix)
        base = Fraction(1, 3000 if codec == "libx264" else 30)  # MPEG codecs know only common rates
        stream.time_base = context.time_base = base
        for number, time in enumerate(times):
            image = pictures(number) if pictures else picture(number % 2**BITS, *size)
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = round(time / base), base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    if hasattr(os, "sched_setscheduler"):
        # For root SVT-AV1's encoder makes the thread that calls it a real-time one of the highest priority, and so all
        # that it starts from then on: Ray and ranks, whose waiting threads then keep each other off the cores.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


@pytest.fixture(name="write")
def _write() -> Callable[..., Path]:
    return write


@pytest.fixture(name="picture")
def _picture() -> Callable[..., np.ndarray]:
    return picture


@pytest.fixture(name="on_screen")
def _on_screen() -> Callable[[np.ndarray, np.ndarray], list[int]]:
    return on_screen


@pytest.fixture(name="number_of")
def _number_of() -> Callable[[np.ndarray], int]:
    return number_of


@pytest.fixture
def local_ray(one_ray) -> None:
    """A Ray of this machine with two logical CPUs; tests that share it tell their runs apart by name."""
    one_ray.start({}, num_cpus=2, _system_config={"metrics_report_interval_ms": 1000})


@pytest.fixture
def cut_to_second_keyframe() -> Callable[[Path, Path], Path]:
    def cut(whole: Path, path: Path) -> Path:
        """Copies the packets of a video from its second keyframe on; nothing is encoded again."""
        with av.open(str(whole)) as source, av.open(str(path), "w") as file:
            stream = file.add_stream_from_template(source.streams.video[0])
            keys = 0
            for packet in source.demux(video=0):
                keys += packet.is_keyframe
                if packet.size and keys >= 2:
                    packet.stream = stream
                    file.mux(packet)
        return path

    return cut
