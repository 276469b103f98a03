"""Images as clips of one frame: JPEG, PNG, WebP, AVIF, BMP, TIFF, recognised by their first bytes.

Animated files are videos, or refused by name. A video container with one frame is an image too: see probe.py.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from data_prep.reasons import ClipError
from data_prep.video.colours import TRANSFERS, UNKNOWN, WIDE
from data_prep.video.damage import jpeg_damage, zero_run
from data_prep.video.probe import check_size
from data_prep.video.readers import on_black

ORIENTATION = 0x0112  # of EXIF: 5 to 8 are rotated by 90°
RAW_MJPEG = {".mjpeg", ".mjpg"}  # JPEGs one after the other; other files also begin with a JPEG and append more images
SRGB_GAMMA = 1 / 2.2  # as a PNG names it
STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}


@dataclass(frozen=True)
class ImageHeader:
    """An image's display size, and a remark on the file or an empty string."""

    width: int
    height: int
    remark: str


def image_format(path: str) -> str:
    """`JPEG`, `PNG`, `WEBP`, `AVIF`, `BMP` or `TIFF`; empty for other files, animated PNG and AVIF, and raw MJPEG."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if Path(path).suffix.lower() in RAW_MJPEG:
        return ""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8 : struct.unpack(">I", head[:4])[0]]
        return "AVIF" if b"avif" in brands and b"avis" not in brands else ""
    kind = next((kind for start, kind in STARTS.items() if head.startswith(start)), "")
    animation = head.partition(b"IDAT")[0].partition(b"acTL")[2][:4] if kind == "PNG" else b""
    return "" if int.from_bytes(animation, "big") > 1 else kind


def read_image_header(path: str) -> ImageHeader:
    """Opens an image without decoding it. Raises ClipError `too_large` or `corrupt`."""
    with open_image(path) as image:
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}  # else it decodes
        size = image.size[::-1] if exif.get(ORIENTATION, 1) >= 5 else image.size
        count = getattr(image, "n_frames", 1) if image.format in ("TIFF", "WEBP") else 1
        if count > 1 and image.format == "WEBP":
            raise ClipError("unreadable", "is an animated WebP, which is not read; convert it to mp4, webm or gif")
        remarks = [f"pages: the first of its {count} images"] if count > 1 else []
        if image.info.get("icc_profile") and srgb_converter(image) is None:
            remarks.append("icc_profile: has an ICC profile that can't be applied")
        if colours := unapplied_colours(path, image):
            remarks.append(f"image_colours: has {colours}, which is not applied to images")
        return ImageHeader(size[0], size[1], "; ".join(remarks))


def read_image(path: str, at_least: int = 0) -> np.ndarray:
    """An image uint8 `H W 3`: upright by its EXIF, in sRGB, transparency on black, 16 bits truncated to 8.

    A JPEG whose sides are many times `at_least` is decoded at a half, a quarter or an eighth of its size. Raises
    ClipError `too_large` or `corrupt`.
    """
    with open_image(path) as image:
        if image.format == "PNG":
            image.verify()  # Pillow's decoder doesn't; an image can't be used after it
        check_damage(path, image.format)
    with open_image(path) as image:
        if at_least:
            image.draft("RGB", (2 * at_least, 2 * at_least))
        image.load()
        convert = srgb_converter(image) if image.info.get("icc_profile") else None
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return (np.asarray(upright) >> 8).astype(np.uint8)[..., None].repeat(3, 2)
        if upright.mode in ("I", "F"):  # no fixed range: scaled from the minimum to the maximum
            values = np.asarray(upright, np.float64)
            if not np.isfinite(values).all():
                raise ClipError("corrupt", "the image has values that are not finite")
            grey = (values - values.min()) * (255 / max(np.ptp(values), 1e-9))
            return grey.round().astype(np.uint8)[..., None].repeat(3, 2)
        colours = convert(upright) if convert else upright
        if upright.has_transparency_data:
            rgba = colours.convert("RGBA")
            rgba.putalpha(upright.convert("RGBA").getchannel("A"))
            return on_black(np.asarray(rgba))
        return np.asarray(colours.convert("RGB"))


def srgb_converter(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """The function that converts an image to sRGB by its ICC profile; None if that is impossible."""
    if image.mode not in ("L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"):
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return lambda picture: picture.convert("RGB")
        mode = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}[image.info["icc_profile"][16:20]]  # ICC.1:2022, 7.2
        if (mode == "L") != (image.mode in ("L", "LA")) or (mode == "CMYK") != (image.mode == "CMYK"):
            return None
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        return lambda picture: ImageCms.applyTransform(picture.convert(mode), transform) or picture
    except (ImageCms.PyCMSError, OSError, KeyError):
        return None


def unapplied_colours(path: str, image: Image.Image) -> str:
    """HDR, a wide gamut or another gamma that an image signals without an ICC profile; empty if it does not."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    signalled = (UNKNOWN, UNKNOWN)  # primaries and transfer, ISO/IEC 23091-2
    if image.format == "AVIF" and len(numbers := head.partition(b"colrnclx")[2][:4]) == 4:  # ISO/IEC 14496-12, 12.1.5
        signalled = struct.unpack(">HH", numbers)
    elif image.format == "PNG":
        header = head.partition(b"IDAT")[0]
        if len(numbers := header.partition(b"cICP")[2][:2]) == 2:
            signalled = numbers[0], numbers[1]
        elif not {"icc_profile", "srgb"} & image.info.keys():
            gamma = image.info.get("gamma", SRGB_GAMMA)
            return f"a gamma of {1 / gamma:.2g}" if gamma and abs(gamma / SRGB_GAMMA - 1) > 0.05 else ""
    primaries, transfer = signalled
    if transfer in TRANSFERS:
        return f"HDR ({TRANSFERS[transfer]})"
    return f"colours of {WIDE[primaries]}" if primaries in WIDE and not image.info.get("icc_profile") else ""


def check_damage(path: str, kind: str | None) -> None:
    """Raises ClipError `corrupt` for a damaged JPEG or WebP, which Pillow accepts."""
    checks = {"JPEG": jpeg_damage, "WEBP": webp_damage}
    with open(path, "rb") as file:
        if kind in checks and (damage := checks[kind](file.read())):
            raise ClipError("corrupt", f"the {kind} is damaged: {damage}")


def webp_damage(content: bytes) -> str:
    """Damage of a lossy WebP, empty if none: its chunks are a name, a size and that many bytes."""
    place = 12
    while place + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, place)
        if name == b"VP8 ":
            return zero_run(content[place + 8 : place + 8 + size], "vp8")
        place += 8 + size + size % 2
    return ""


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Opens an image; errors inside the block become ClipError."""
    kind = image_format(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings of sizes and metadata
            with Image.open(path, formats=[kind]) as image:
                check_size([image.size])
                yield image
    except Image.DecompressionBombError as error:
        raise ClipError("too_large", str(error)) from None
    except ClipError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, UnidentifiedImageError) as error:
        raise ClipError("corrupt", f"the {kind} is damaged or ends early: {error}") from None
