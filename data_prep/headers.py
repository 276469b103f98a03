"""What a file declares of itself, read before anything of it is decoded."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av

from data_prep.reasons import ClipError

LARGEST_SIDE = 8192
LARGEST_FRAME = 64 * 10**6  # pixels
MP4_STARTS = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}
CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}


@dataclass(frozen=True)
class Header:
    """A video as its container describes it. `promised_s` is 0 where nothing is promised."""

    container: str
    width: int
    height: int
    pixel_aspect: float
    promised_s: float
    frame_s: float


def read_header(path: str) -> Header:
    """Opens a video without decoding a frame.

    Raises ClipError `unreadable`, `no_video_stream`, or `too_large`.
    """
    check_size(path, mp4_sizes(path))
    try:
        file = av.open(path)
    except (av.FFmpegError, ValueError) as error:
        raise ClipError("unreadable", f"no decoder can open it: {plain(error)}") from None
    with file:
        if not file.streams.video:
            raise ClipError("no_video_stream", f"{len(file.streams)} streams, none of them video")
        stream = file.streams.video[0]
        check_size(path, [(stream.codec_context.width, stream.codec_context.height)])
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        promised = 0.0
        if stream.duration and stream.time_base:
            promised = float(stream.duration * stream.time_base)
        elif stream.frames:
            promised = float(stream.frames / rate)
        elif "DURATION" in stream.metadata:  # Matroska's own, per track: 00:00:02.567000000
            hours, minutes, seconds = stream.metadata["DURATION"].split(":")
            promised = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        elif file.duration:
            promised = file.duration / av.time_base
        return Header(
            file.format.name,
            stream.codec_context.width,
            stream.codec_context.height,
            float(stream.sample_aspect_ratio or 1),
            promised,
            float(1 / rate),
        )


def check_size(path: str, sizes: list[tuple[int, int]]) -> None:
    """Raises ClipError `too_large` where a frame would pass the limits."""
    for width, height in sizes:
        if max(width, height) > LARGEST_SIDE or width * height > LARGEST_FRAME:
            limit = f"{LARGEST_SIDE} pixels a side and {LARGEST_FRAME // 10**6} million in all"
            raise ClipError("too_large", f"declares frames of {width}x{height}; the limit is {limit}")


def mp4_sizes(path: str) -> list[tuple[int, int]]:
    """The frame sizes that an mp4's sample descriptions name; nothing for other files.

    FFmpeg replaces them by what the stream itself says, but a decoder may have made room for them by then. ISO/IEC
    14496-12, 8.5.2 and 12.1.3: width and height stand 24 bytes into a visual sample entry.
    """
    sizes: list[tuple[int, int]] = []
    handler = b""
    with Path(path).open("rb") as file:
        if file.read(8)[4:] not in MP4_STARTS:
            return sizes
        for kind, start, end in boxes(file, 0, Path(path).stat().st_size):
            file.seek(start)
            if kind == b"hdlr" and (described := file.read(12))[4:8] != b"dhlr":  # QuickTime also has data handlers
                handler = described[8:]
            elif kind == b"stsd" and handler == b"vide":
                for _, entry, stop in boxes(file, start + 8, end):
                    if stop - entry >= 28:
                        file.seek(entry + 24)
                        sizes.append(struct.unpack(">HH", file.read(4)))
    return sizes


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


def plain(error: Exception) -> str:
    """An FFmpeg error's own words, without its number and the path."""
    return getattr(error, "strerror", None) or str(error)
