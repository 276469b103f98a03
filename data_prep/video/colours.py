"""Converts decoded frames to sRGB by the colours that the stream or its container signals.

swscale applies matrix and range. HDR (PQ and HLG, ITU-R BT.2100) and wide gamuts are converted here by their formulas:
203 cd/m2, the reference white of BT.2408, becomes white, and what is brighter or more saturated is clipped. swscale's
own conversion takes seconds to prepare for each size and shifts saturated colours. HD videos without a signalled matrix
are taken as BT.709, as players do; swscale alone would take BT.601.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc

UNKNOWN = 2  # in ISO/IEC 23091-2, of matrix, primaries and transfer alike
TRANSFERS = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}
WIDE = {int(ColorPrimaries.BT2020): "BT.2020", int(ColorPrimaries.SMPTE431): "P3", int(ColorPrimaries.SMPTE432): "P3"}
HD_WIDTH, HD_HEIGHT = 1280, 577  # from this width or height on
INTERLACED = {2, 3, 4, 5}  # AVFieldOrder but for progressive
WHITE, HLG_PEAK, GAMMA = 203.0, 1000.0, 2.4  # cd/m2; the exponent is that of SDR displays, BT.1886
CHROMATICITIES = {  # of red, green and blue, x and y
    "BT.709": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "BT.2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
D65 = (0.3127, 0.3290)
STEPS = 1 << 12  # of the table from linear light to sRGB


@dataclass(frozen=True)
class Colours:
    """Signalled colours: numbers of the matrix, primaries and transfer function."""

    matrix: int = UNKNOWN
    primaries: int = UNKNOWN
    transfer: int = UNKNOWN


def colours_of(place: Any) -> Colours:
    """The colours of a codec context or a frame."""
    return Colours(int(place.colorspace), int(place.color_primaries), int(place.color_trc))


def to_rgb(frame: Any, said: Colours, form: str) -> np.ndarray:
    """A frame as `rgb24` or `rgba`. `said` applies if the frame itself signals nothing."""
    own = colours_of(frame)
    colours = Colours(*(b if a == UNKNOWN else a for a, b in zip(vars(own).values(), vars(said).values(), strict=True)))
    if colours.transfer in TRANSFERS or colours.primaries in WIDE:
        frame.colorspace = colours.matrix
        deep = frame.to_ndarray(format="rgba64le" if form == "rgba" else "rgb48le")
        mapped = to_srgb(deep[..., :3], colours)
        return np.dstack([mapped, (deep[..., 3:] >> 8).astype(np.uint8)]) if form == "rgba" else mapped
    is_hd = frame.width >= HD_WIDTH or frame.height >= HD_HEIGHT
    is_unnamed = colours.matrix == UNKNOWN and is_hd and not frame.format.is_rgb
    frame.colorspace = int(Colorspace.ITU709) if is_unnamed else colours.matrix
    return frame.to_ndarray(format=form)


def to_srgb(image: np.ndarray, colours: Colours) -> np.ndarray:
    """Converts uint16 `H W 3` of a wide gamut, HDR or both to uint8 sRGB."""
    light = linear_light_table(colours.transfer)[image]  # 1 is white
    if colours.transfer == int(ColorTrc.ARIB_STD_B67):  # the display's part: BT.2100, table 5
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (luminance**0.2 * np.float32(HLG_PEAK / WHITE))[..., None]
    gamut = WIDE.get(colours.primaries, "BT.2020")
    light = light @ (np.linalg.inv(to_xyz("BT.709")) @ to_xyz(gamut)).T.astype(np.float32)
    codes = (np.sqrt(light.clip(0, 1)) * (STEPS - 1) + 0.5).astype(np.int32)  # a root: dark steps are seen most
    return srgb_table(colours.transfer in TRANSFERS)[codes]


@lru_cache(maxsize=4)
def linear_light_table(transfer: int) -> np.ndarray:
    """Linear light for each of 65536 codes: display light for PQ and SDR (1 is white), scene light up to 1 for HLG."""
    code = np.linspace(0, 1, 1 << 16)
    if transfer == int(ColorTrc.SMPTE2084):
        root = code ** (1 / 78.84375)
        light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
        return (light * (10000 / WHITE)).astype(np.float32)
    if transfer == int(ColorTrc.ARIB_STD_B67):
        upper = (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12
        return np.where(code <= 0.5, code**2 / 3, upper).astype(np.float32)
    return (code**GAMMA).astype(np.float32)


@lru_cache(maxsize=2)
def srgb_table(is_hdr: bool) -> np.ndarray:
    """uint8 codes for light whose square roots are evenly spaced: sRGB's curve, or for SDR the gamma it came with."""
    light = np.linspace(0, 1, STEPS) ** 2
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * (srgb if is_hdr else light ** (1 / GAMMA))).astype(np.uint8)


@lru_cache(maxsize=3)
def to_xyz(gamut: str) -> np.ndarray:
    """The matrix from linear RGB to XYZ, for a white point of D65."""
    x, y = np.array([*CHROMATICITIES[gamut], D65]).T
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])


def colour_remarks(context: Any) -> list[str]:
    """Remarks on signalled properties that are not applied exactly; see reasons.REMARKS."""
    remarks, colours = [], colours_of(context)
    if transfer := TRANSFERS.get(colours.transfer):
        remarks.append(f"hdr: is HDR ({transfer}), mapped to SDR; what is brighter than 203 cd/m2 is clipped")
    elif gamut := WIDE.get(colours.primaries):
        remarks.append(f"wide_gamut: has colours of {gamut}, mapped to BT.709; what is more saturated is clipped")
    if context.field_order in INTERLACED:
        remarks.append("interlaced: is interlaced, and both fields of a frame are taken as one picture")
    return remarks
