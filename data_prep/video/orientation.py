"""The orientation of a decoded frame: how to rotate and mirror it to be upright.

FFmpeg reads it from an mp4's track header, a Matroska projection, EXIF, or a display orientation SEI message, and
attaches it to frames as a display matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.reformatter import Interpolation

EXIF = 31  # AV_FRAME_DATA_EXIF
DISPLAY_ORIENTATION = 47  # the type of SEI message: ITU-T H.274, 8.5
SEI = {"h264": (0x1F, 0, (6,), 1), "hevc": (0x7E, 1, (39, 40), 2)}  # a NAL unit's type: mask, shift, SEI's, header


@dataclass(frozen=True)
class Orientation:
    """One of eight: first exchange rows and columns, then mirror left-right, then top-bottom."""

    transposed: bool = False
    mirrored: bool = False
    upside_down: bool = False

    def upright(self, image: np.ndarray) -> np.ndarray:
        """A view of an image `H W c`, upright."""
        image = image.swapaxes(0, 1) if self.transposed else image
        return image[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]


UPRIGHT = Orientation()


def orientation_of(frame: Any) -> Orientation | None:
    """The orientation of a PyAV frame, if it has one, rounded to a multiple of 90 degrees."""
    # Side data and its frame form a reference cycle until garbage is collected. A small copy keeps that cheap.
    small = frame.reformat(16, 16, interpolation=Interpolation.POINT)
    try:
        side_data = small.side_data
    except ValueError:  # PyAV 18.1 refuses all side data if it does not know one type, such as EXIF
        side_data = without_exif(small).side_data
    if Type.DISPLAYMATRIX not in side_data:
        return None
    matrix = bytes(side_data[Type.DISPLAYMATRIX])
    # `a b u c d v x y w` takes a pixel x, y to a x + c y, b x + d y: libavutil/display.h, ISO/IEC 14496-12 8.3.2
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(np.int64)
    if abs(b) > abs(a):
        return Orientation(True, bool(c < 0), bool(b < 0))
    return Orientation(False, bool(a < 0), bool(d < 0))


def without_exif(frame: Any) -> Any:
    """The frame without its EXIF side data; its display matrix has the same orientation."""
    graph = Graph()
    place = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(place, graph.add("sidedata", f"mode=delete:type={EXIF}"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def orientation_sei(packet: bytes, codec: str, extradata: bytes) -> bool:
    """Whether an H.264 or HEVC packet, or the stream's extradata, holds a display orientation SEI message."""
    mask, shift, types, header = SEI[codec]
    lengths = 0
    # With an avcC or hvcC (ISO/IEC 14496-15) NAL units follow their lengths.
    if extradata[:1] == b"\x01" and not packet.startswith(b"\0\0\0\1"):
        lengths = (extradata[4] if codec == "h264" else extradata[21]) % 4 + 1 if len(extradata) > 21 else 4
    for unit in [*nal_units(packet, lengths), *nal_units(extradata, 0)]:
        if unit and (unit[0] & mask) >> shift in types and DISPLAY_ORIENTATION in sei_types(unit[header:]):
            return True
    return False


def nal_units(data: bytes, lengths: int) -> Iterator[bytes]:
    """The NAL units of a packet: each after a length of `lengths` bytes, or (0) after a start code."""
    if not lengths:
        yield from data.split(b"\0\0\1")[1:]
        return
    place = 0
    while place + lengths < len(data):
        size = int.from_bytes(data[place : place + lengths], "big")
        yield data[place + lengths : place + lengths + size]
        place += lengths + size


def sei_types(unit: bytes) -> Iterator[int]:
    """The types of a NAL unit's SEI messages."""
    data, place = unit.replace(b"\0\0\3", b"\0\0"), 0
    while place + 2 < len(data):
        numbers = []
        for _ in ("type", "size"):
            number = 0
            while place < len(data) and data[place] == 0xFF:
                number, place = number + 255, place + 1
            numbers.append(number + (data[place] if place < len(data) else 0))
            place += 1
        yield numbers[0]
        place += numbers[1]
