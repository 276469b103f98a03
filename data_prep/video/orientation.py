"""The orientation of a decoded frame: how to rotate and mirror it to be upright.

FFmpeg reads it from an mp4's track header, a Matroska projection, EXIF, or a display orientation SEI message, and
attaches it to frames as a display matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.reformatter import Interpolation

UNKNOWN_TYPES = range(28, 32)  # of side data, EXIF among them (AVFrameSideDataType); PyAV 18.1 knows those below


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
    except ValueError:  # PyAV refuses all side data if it does not know one type
        side_data = with_known_side_data(small).side_data
    if Type.DISPLAYMATRIX not in side_data:
        return None
    matrix = bytes(side_data[Type.DISPLAYMATRIX])
    # `a b u c d v x y w` takes a pixel x, y to a x + c y, b x + d y: libavutil/display.h, ISO/IEC 14496-12 8.3.2
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(np.int64)
    if abs(b) > abs(a):
        return Orientation(True, bool(c < 0), bool(b < 0))
    return Orientation(False, bool(a < 0), bool(d < 0))


def with_known_side_data(frame: Any) -> Any:
    """The frame without side data that PyAV does not know; EXIF's orientation is in the display matrix too."""
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    deleted = (graph.add("sidedata", f"mode=delete:type={number}") for number in UNKNOWN_TYPES)
    graph.link_nodes(source, *deleted, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()
