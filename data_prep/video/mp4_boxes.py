"""Facts from the boxes of an mp4, read without FFmpeg: ISO/IEC 14496-12."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

MP4_STARTS = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}
MATRICES = {b"mvhd": (36, 48), b"tkhd": (40, 52)}
CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}


class Mp4Facts(NamedTuple):
    """Frame sizes of an mp4's sample descriptions, whether it has a display matrix, and remarks."""

    sizes: list[tuple[int, int]]
    has_matrix: bool
    remarks: list[str]


def read_mp4_facts(path: str) -> Mp4Facts:
    """Facts from an mp4's boxes; no facts for other files.

    FFmpeg overwrites the sizes with those of the stream, but a decoder may have allocated memory for them by then.
    8.5.2 and 12.1.3: width and height are 24 bytes into a visual sample entry. 8.2.2 and 8.3.2: a matrix
    `a b u c d v x y w` is 36 bytes into the movie header (48 in version 1), 40 into a track header (52).
    """
    facts = Mp4Facts([], False, [])
    handler = b""
    with Path(path).open("rb") as file:
        if file.read(8)[4:] not in MP4_STARTS:
            return facts
        for kind, start, end in boxes(file, 0, Path(path).stat().st_size):
            file.seek(start)
            if kind in MATRICES and len(content := file.read(72)) == 72:
                a, b, _, c, d = struct.unpack_from(">5i", content, MATRICES[kind][bool(content[0])])
                facts = facts._replace(has_matrix=facts.has_matrix or min(a, d) < 0 or b != 0 or c != 0)
            elif kind == b"hdlr" and (described := file.read(12))[4:8] != b"dhlr":  # QuickTime also has data handlers
                handler = described[8:]
            elif kind == b"stsd" and handler == b"vide":
                facts.remarks.extend(clean_aperture(file.read(min(end - start, 1 << 16))))
                for _, entry, stop in boxes(file, start + 8, end):
                    if stop - entry >= 28:
                        file.seek(entry + 24)
                        facts.sizes.append(struct.unpack(">HH", file.read(4)))
    return facts


def clean_aperture(descriptions: bytes) -> list[str]:
    """A remark if sample descriptions say that only a part of each frame is to be shown: 12.1.4."""
    place = descriptions.find(b"clap")
    if not 28 <= place <= len(descriptions) - 36:
        return []
    width_n, width_d, height_n, height_d = struct.unpack_from(">4I", descriptions, place + 4)
    width, height = struct.unpack_from(">HH", descriptions, 8 + 8 + 24)
    if not (width_d and height_d and (width_n / width_d, height_n / height_d) < (width, height)):
        return []
    part = f"{width_n / width_d:g}x{height_n / height_d:g}"
    return [f"clean_aperture: of its {width}x{height} pixels {part} are to be shown, and all are taken"]


def boxes(file: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start of the content, and end of each box, also inside containers. Stops at an invalid size."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        size, kind = struct.unpack(">I4s", head[:8])
        content = start + 8
        if size == 1 and len(head) == 16:
            size, content = struct.unpack(">Q", head[8:])[0], start + 16
        stop = min(end, start + size) if size else end
        if stop < content:
            return
        yield kind, content, stop
        if kind in CONTAINERS and depth < 8:
            yield from boxes(file, content, stop, depth + 1)
        start = stop
