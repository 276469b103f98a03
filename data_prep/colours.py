"""Decoded frames to sRGB pixels, by what the stream or its container says of its colours.

swscale applies the matrix and the range. HDR (PQ and HLG) and wide gamuts are converted by swscale too: 203 cd/m2, the
reference white of ITU-R BT.2408, becomes white, and what is brighter or more saturated is clipped. Videos of HD size
that name no matrix are taken as BT.709, as players do; swscale alone would take BT.601.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, VideoReformatter

UNKNOWN = 2  # in ISO/IEC 23091-2, of matrix, primaries and transfer alike
TRANSFERS = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}
WIDE = {int(ColorPrimaries.BT2020): "BT.2020", int(ColorPrimaries.SMPTE431): "P3", int(ColorPrimaries.SMPTE432): "P3"}
HD_WIDTH, HD_HEIGHT = 1280, 577  # from this width or height on
INTERLACED = {2, 3, 4, 5}  # AVFieldOrder but for progressive
MAPPER = VideoReformatter()  # one for all files: swscale takes seconds to prepare a conversion, and keeps the last one


@dataclass(frozen=True)
class Colours:
    """What a container or stream says of its colours: matrix, primaries and transfer by their numbers."""

    matrix: int = UNKNOWN
    primaries: int = UNKNOWN
    transfer: int = UNKNOWN


def colours_of(place: Any) -> Colours:
    """Those of a codec context or a frame."""
    return Colours(int(place.colorspace), int(place.color_primaries), int(place.color_trc))


def pixels(frame: Any, said: Colours, form: str) -> np.ndarray:
    """A frame in the format `rgb24` or `rgba`. `said` counts where the frame itself says nothing."""
    own = colours_of(frame)
    colours = Colours(*(b if a == UNKNOWN else a for a, b in zip(vars(own).values(), vars(said).values(), strict=True)))
    if colours.transfer in TRANSFERS or colours.primaries in WIDE:
        frame.colorspace, frame.color_primaries, frame.color_trc = vars(colours).values()
        transfer = ColorTrc.IEC61966_2_1 if colours.transfer in TRANSFERS else ColorTrc.BT709
        return MAPPER.reformat(
            frame, format=form, dst_color_trc=transfer, dst_color_primaries=ColorPrimaries.BT709, threads=1
        ).to_ndarray()
    is_hd = frame.width >= HD_WIDTH or frame.height >= HD_HEIGHT
    if colours.matrix == UNKNOWN and is_hd and not frame.format.is_rgb:
        return frame.reformat(format=form, src_colorspace=Colorspace.ITU709).to_ndarray()
    if colours.matrix != own.matrix:
        frame.colorspace = colours.matrix
    return frame.to_ndarray(format=form)


def colour_remarks(context: Any) -> list[str]:
    """What is signalled and not applied as it is, as remarks; see reasons.REMARKS."""
    remarks, colours = [], colours_of(context)
    if transfer := TRANSFERS.get(colours.transfer):
        remarks.append(f"hdr: is HDR ({transfer}), mapped to SDR; what is brighter than 203 cd/m2 is clipped")
    elif gamut := WIDE.get(colours.primaries):
        remarks.append(f"wide_gamut: has colours of {gamut}, mapped to BT.709; what is more saturated is clipped")
    if context.field_order in INTERLACED:
        remarks.append("interlaced: is interlaced, and both fields of a frame are taken as one picture")
    return remarks
