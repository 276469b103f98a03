"""Still pictures as clips of one frame: JPEG, PNG, WebP, BMP, TIFF, told by their first bytes. A GIF is a video."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.frames import on_black
from data_prep.headers import check_size
from data_prep.reasons import ClipError

ORIENTATION = 0x0112  # of EXIF: 5 to 8 are on their side
STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}


@dataclass(frozen=True)
class Still:
    """A picture's size as it is shown, and a remark on the file, or none."""

    width: int
    height: int
    remark: str


def still_kind(path: str) -> str:
    """`JPEG`, `PNG`, `WEBP`, `BMP`, `TIFF`; empty for anything else."""
    with open(path, "rb") as file:
        head = file.read(16)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for start, kind in STARTS.items() if head.startswith(start)), "")


def read_still_header(path: str) -> Still:
    """Opens a picture without decoding it. Raises ClipError `too_large`, `truncated` or `corrupt`."""
    with picture(path) as image:
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}  # else PNG decodes to look
        size = image.size[::-1] if exif.get(ORIENTATION, 1) >= 5 else image.size
        count = getattr(image, "n_frames", 1) if image.format in ("PNG", "TIFF", "WEBP") else 1
        remark = f"the first of its {count} pictures" if count > 1 else ""
        return Still(size[0], size[1], remark)


def read_still(path: str, at_least: int = 0) -> np.ndarray:
    """A picture uint8 `H W 3`: turned as its EXIF says, transparency on black, 16 bits cut to 8.

    A JPEG whose sides are many times `at_least` is decoded at a half, a quarter or an eighth of its size. Raises
    ClipError `too_large`, `truncated` or `corrupt`.
    """
    with picture(path) as image:
        if image.format == "PNG":
            image.verify()  # which Pillow's decoder doesn't; it takes the file apart, so that it is opened again
    with picture(path) as image:
        if at_least:
            image.draft("RGB", (2 * at_least, 2 * at_least))
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return (np.asarray(upright) >> 8).astype(np.uint8)[..., None].repeat(3, 2)
        if upright.mode in ("I", "F"):  # of no fixed range: stretched from its darkest to its brightest
            values = np.asarray(upright, np.float64)
            low, high = float(values.min()), float(values.max())
            return ((values - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)[..., None].repeat(3, 2)
        if upright.has_transparency_data:
            return on_black(np.asarray(upright.convert("RGBA")))
        return np.asarray(upright.convert("RGB"))


@contextmanager
def picture(path: str) -> Iterator[Image.Image]:
    """An opened picture; what goes wrong inside becomes a ClipError."""
    kind = still_kind(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own opinion on sizes and on odd metadata
            with Image.open(path, formats=[kind]) as image:
                check_size([image.size])
                yield image
    except Image.DecompressionBombError as error:
        raise ClipError("too_large", str(error)) from None
    except ClipError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, UnidentifiedImageError) as error:
        if "truncated" in str(error) or is_cut(path, kind):
            raise ClipError("truncated", f"the {kind} breaks off: {error}") from None
        raise ClipError("corrupt", f"the {kind} can't be decoded: {error}") from None


def is_cut(path: str, kind: str) -> bool:
    """Whether a picture's own end is missing from its file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(max(0, size - 4096))
        tail = file.read()
    if kind in ("WEBP", "BMP"):  # both say how large the file is
        declared = int.from_bytes(head[4:8], "little") + 8 if kind == "WEBP" else int.from_bytes(head[2:6], "little")
        return size < declared
    return {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind, b"") not in tail
