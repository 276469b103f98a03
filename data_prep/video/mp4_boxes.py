"""What an mp4 says in its boxes, read without FFmpeg. ISO/IEC 14496-12."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MP4_STARTS = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}
MATRICES = {b"mvhd": (36, 48), b"tkhd": (40, 52)}
CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}


def mp4_facts(path: str) -> tuple[list[tuple[int, int]], bool]:
    """The frame sizes that an mp4's sample descriptions name, and whether it has a display matrix; nothing for others.

    FFmpeg replaces the sizes by what the stream itself says, but a decoder may have made room for them by then.
    8.5.2 and 12.1.3: width and height stand 24 bytes into a visual sample entry; 8.2.2 and 8.3.2: a matrix
    `a b u c d v x y w` stands 36 bytes into the film's header (48 in version 1), 40 into a track's (52).
    """
    sizes: list[tuple[int, int]] = []
    handler, has_matrix = b"", False
    with Path(path).open("rb") as file:
        if file.read(8)[4:] not in MP4_STARTS:
            return sizes, False
        for kind, start, end in boxes(file, 0, Path(path).stat().st_size):
            file.seek(start)
            if kind in MATRICES and len(content := file.read(72)) == 72:
                a, b, _, c, d = struct.unpack_from(">5i", content, MATRICES[kind][bool(content[0])])
                has_matrix = has_matrix or min(a, d) < 0 or b != 0 or c != 0
            elif kind == b"hdlr" and (described := file.read(12))[4:8] != b"dhlr":  # QuickTime also has data handlers
                handler = described[8:]
            elif kind == b"stsd" and handler == b"vide":
                for _, entry, stop in boxes(file, start + 8, end):
                    if stop - entry >= 28:
                        file.seek(entry + 24)
                        sizes.append(struct.unpack(">HH", file.read(4)))
    return sizes, has_matrix


def clean_aperture(path: str) -> list[str]:
    """A remark where an mp4 names a part of its frames that alone is to be shown: 12.1.4."""
    with Path(path).open("rb") as file:
        if file.read(8)[4:] not in MP4_STARTS:
            return []
        for kind, start, end in boxes(file, 0, Path(path).stat().st_size):
            if kind != b"stsd":
                continue
            file.seek(start)
            content = file.read(min(end - start, 1 << 16))
            place = content.find(b"clap")
            if 28 <= place <= len(content) - 36:
                across, by, down, by_2 = struct.unpack_from(">4I", content, place + 4)
                width, height = struct.unpack_from(">HH", content, 8 + 8 + 24)
                if by and by_2 and (across / by, down / by_2) < (width, height):
                    return [
                        f"clean_aperture: of its {width}x{height} pixels {across / by:g}x{down / by_2:g} are to be "
                        "shown, and all are taken"
                    ]
    return []


def boxes(file: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte of the content, and end of each box, those inside containers too. Stops at nonsense."""
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
