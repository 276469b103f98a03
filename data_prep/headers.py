"""What a file declares of itself, read before anything of it is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from data_prep.boxes import mp4_facts
from data_prep.reasons import ClipError

LARGEST_SIDE = 8192
LARGEST_FRAME = 64 * 10**6  # pixels; 8192x8192 is 67 million
EBML, CLUSTER, PROJECTION = b"\x1a\x45\xdf\xa3", b"\x1f\x43\xb6\x75", b"\x76\x70"  # RFC 9559, 5.1
FORMATS = (
    "mov matroska avi mpegts mpeg flv asf ogg gif apng mxf nut dv yuv4mpegpipe ivf rm wtv gxf obu av1 h264 hevc vvc "
    "vc1 m4v mpegvideo mjpeg h263 cavsvideo dirac dnxhd"
)
"""FFmpeg's names of the formats that hold pictures themselves: none that names other files or addresses."""
ALONE = {"format_whitelist": ",".join(FORMATS.split()), "protocol_whitelist": "file", "enable_drefs": "0"}
"""Options of every open: nothing but the file itself is read."""
FORMATS_HINT = "convert it to mp4, or an image to png or jpg"
STRANGEST_PIXEL = 8.0  # a pixel's width over its height; beyond it (or below its inverse) the tag is nonsense


@dataclass(frozen=True)
class Header:
    """A video as its container describes it; times in seconds. `promised_s` is 0 where nothing is promised.

    `turned` says that it is shown on its side.
    """

    container: str
    width: int
    height: int
    pixel_aspect: float
    promised_s: float
    frames_per_second: float
    turned: bool
    alpha: bool

    @property
    def frame_s(self) -> float:
        """How long a frame is shown, on average."""
        return 1 / self.frames_per_second

    @property
    def shown(self) -> tuple[float, float]:
        """Width and height as a viewer sees them: pixels square, turned upright."""
        width, height = self.width * self.pixel_aspect, float(self.height)
        return (height, width) if self.turned else (width, height)


def read_header(path: str) -> Header:
    """Opens a video without decoding a frame.

    Raises ClipError `unreadable`, `no_video_stream`, or `too_large`.
    """
    sizes, turned = mp4_facts(path)
    check_size(sizes)
    with opened(path) as file:
        stream = video_of(file)
        context = stream.codec_context
        if not context.width:  # some decoders forget the size that they were not to look at
            check_size(sizes_without_limit(path))
        check_size([(context.width, context.height)])
        if not (context.width and context.height):
            raise ClipError("unreadable", "names no frame size")
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        start = 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base)
        aspect = float(stream.sample_aspect_ratio or 1)
        return Header(
            container=file.format.name,
            width=context.width,
            height=context.height,
            pixel_aspect=aspect if 1 / STRANGEST_PIXEL <= aspect <= STRANGEST_PIXEL else 1.0,
            promised_s=promised(file, stream, start),
            frames_per_second=float(rate),
            turned=turned or is_turned_matroska(path),
            alpha=stream.metadata.get("alpha_mode") == "1" or has_alpha(context.format),
        )


def opened(path: str, largest: int = LARGEST_FRAME) -> Any:
    """A file opened by PyAV. FFmpeg may look at a frame of at most `largest` pixels, and at no other file.

    Raises ClipError `unreadable`.
    """
    try:
        return av.open(path, options={**ALONE, "max_pixels": str(largest)})
    except av.ArgumentError:
        raise ClipError("unreadable", f"is a playlist or of another format that is not read; {FORMATS_HINT}") from None
    except (av.FFmpegError, ValueError) as error:
        raise ClipError("unreadable", f"no decoder can open it: {plain(error)}") from None


def sizes_without_limit(path: str) -> list[tuple[int, int]]:
    """The frame size of a video, at whatever cost: FFmpeg's own limit is 268 million pixels."""
    with opened(path, (1 << 31) - 1) as file:
        context = video_of(file).codec_context
        return [(context.width, context.height)]


def video_of(file: Any) -> Any:
    """The best video stream, a cover picture apart. Raises ClipError `no_video_stream`."""
    stream = file.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise ClipError("no_video_stream", f"{len(file.streams)} streams, none of them video")
    return stream


def has_alpha(form: Any) -> bool:
    """Whether a pixel format, or None, carries transparency; palettes may."""
    return form is not None and (form.has_palette or any(component.is_alpha for component in form.components))


def promised(file: Any, stream: Any, start: float) -> float:
    """How long a container says that its video lasts."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if stream.frames:
        return float(stream.frames / (stream.average_rate or stream.guessed_rate or 25))
    if "DURATION" in stream.metadata:  # Matroska's own, per track: 00:00:02.567000000 is where it ends
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return max(0.0, int(hours) * 3600 + int(minutes) * 60 + float(seconds) - start)
    if not file.duration:
        return 0.0
    whole = file.duration / av.time_base
    if len(file.streams) == 1:
        return whole
    # The longest stream's duration, not the video's: where the file's tail is there, it says when the video ends.
    ends: dict[int, float] = {}
    for index, _, end in packet_times(file, file.streams, from_s=whole):
        ends[index] = max(end, ends.get(index, 0.0))
    video = ends.get(stream.index, 0.0)
    return video - start if video > start and max(ends.values()) >= whole - 0.1 else whole


def demuxed_seconds(path: str) -> float:
    """How long a video lasts by its packets, none of which is decoded; 0 where nothing can be read."""
    with opened(path) as file:
        stream = video_of(file)
        frame_s = float(1 / (stream.average_rate or stream.guessed_rate or 25))
        first, last, count = None, 0.0, 0
        for _, start, end in packet_times(file, [stream]):
            count += 1
            if start is not None:
                first, last = start if first is None else min(first, start), max(last, end)
        return count * frame_s if first is None else max(0.0, last - first)


def packet_times(file: Any, streams: Any, from_s: float | None = None) -> Iterator[tuple[int, float | None, float]]:
    """Stream, start and end in seconds of a file's packets that are shown, as far as it can be read."""
    ticks = {stream.index: float(stream.time_base) for stream in streams}
    try:
        if from_s is not None:
            file.seek(int(from_s * av.time_base), backward=True)
        for packet in file.demux(*streams):
            if packet.size and not packet.is_discard:
                tick, stamp = ticks[packet.stream_index], packet.dts if packet.pts is None else packet.pts
                start = None if stamp is None else stamp * tick
                yield packet.stream_index, start, (start or 0.0) + (packet.duration or 0) * tick
    except (av.FFmpegError, ValueError):
        return


def check_size(sizes: list[tuple[int, int]]) -> None:
    """Raises ClipError `too_large` where a frame would pass the limits."""
    for width, height in sizes:
        if max(width, height) > LARGEST_SIDE or width * height > LARGEST_FRAME:
            limit = f"{LARGEST_SIDE} pixels a side and {LARGEST_FRAME // 10**6} million in all"
            raise ClipError("too_large", f"declares frames of {width}x{height}; the limit is {limit}")


def is_turned_matroska(path: str) -> bool:
    """Whether a Matroska file that has a projection (which is how it says so) is shown on its side: a frame tells."""
    with Path(path).open("rb") as file:
        head = file.read(1 << 16)
    tracks = head.partition(CLUSTER)[0]
    if not head.startswith(EBML) or PROJECTION not in tracks:
        return False
    try:
        with opened(path) as file:
            return round(next(file.decode(video_of(file))).rotation / 90) % 2 == 1
    except (av.FFmpegError, StopIteration):
        return False


def plain(error: Exception) -> str:
    """An FFmpeg error's own words, without its number and the path."""
    return getattr(error, "strerror", None) or str(error)
