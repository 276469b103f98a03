"""Videos whose frames carry their own number, so that a test can read off which frame it got."""

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


def write(
    path: Path, times: np.ndarray, codec: str = "libx264", size: tuple[int, int] = (128, 64), gop: int = 12
) -> Path:
    """A video whose frame i is `picture(i)`, shown at `times[i]` seconds."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.codec_context.thread_count = 1
        base = Fraction(1, 3000 if codec == "libx264" else 30)  # MPEG codecs know only common rates
        stream.time_base = stream.codec_context.time_base = base
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.fixture(name="write")
def _write() -> Callable[..., Path]:
    return write


@pytest.fixture(name="number_of")
def _number_of() -> Callable[[np.ndarray], int]:
    return number_of
