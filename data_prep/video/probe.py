"""Reads a video's header before decoding: size, duration, rate, orientation and colours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from data_prep.reasons import ClipError
from data_prep.video.colours import Colours, colour_remarks, colours_of
from data_prep.video.mp4_boxes import read_mp4_facts
from data_prep.video.orientation import UPRIGHT, Orientation, orientation_of, orientation_sei

MAX_SIDE = 8192
MAX_PIXELS = 64 * 10**6  # pixels; 8192x8192 is 67 million
EBML, CLUSTER, PROJECTION = b"\x1a\x45\xdf\xa3", b"\x1f\x43\xb6\x75", b"\x76\x70"  # RFC 9559, 5.1
FORMATS = (
    "mov matroska avi mpegts mpeg flv asf ogg gif apng mxf nut dv yuv4mpegpipe ivf rm wtv gxf obu av1 h264 hevc vvc "
    "vc1 m4v mpegvideo mjpeg h263 cavsvideo dirac dnxhd"
)
"""FFmpeg's names of the allowed formats: those that contain their images. None refers to other files or addresses."""
OPEN_OPTIONS = {"format_whitelist": ",".join(FORMATS.split()), "protocol_whitelist": "file", "enable_drefs": "0"}
"""Options of every open: only the file itself is read."""
HEIF = ("heic", "heix", "heim", "heis", "mif1")
FORMATS_HINT = "convert it to mp4, or an image to png or jpg"
MAX_FRAME_RATE = 1000  # frames per second; containers without a frame rate may give their clock's
MAX_PIXEL_ASPECT = 8.0  # width / height of a pixel; a tag beyond it (or below its inverse) is ignored
LEADING_PACKETS = 16  # packets that are read before anything is decoded
EXIF_CODECS = {"mjpeg", "png", "apng", "webp", "tiff"}


@dataclass(frozen=True)
class Header:
    """A video as its container describes it. `container_duration_s` is 0 if unknown.

    `orientation` is that of the first frame, and `may_rotate` says that frames may carry one; `aspect_in_stream` says
    that no container overrides the pixel aspect that the stream itself names, and may change; `still`, that the file
    holds one picture; `colours` and `remarks` are of what it signals.
    """

    container: str
    width: int
    height: int
    pixel_aspect: float
    container_duration_s: float
    frames_per_second: float
    orientation: Orientation
    may_rotate: bool
    alpha: bool
    aspect_in_stream: bool
    still: bool
    colours: Colours
    remarks: tuple[str, ...]

    @property
    def frame_s(self) -> float:
        """Mean duration of a frame."""
        return 1 / self.frames_per_second

    @property
    def is_rotated(self) -> bool:
        """Whether rows and columns are exchanged for display."""
        return self.orientation.transposed

    @property
    def display_size(self) -> tuple[float, float]:
        """Width and height in square pixels, upright."""
        width, height = self.width * self.pixel_aspect, float(self.height)
        return (height, width) if self.is_rotated else (width, height)


def read_header(path: str) -> Header:
    """Opens a video. One frame is decoded if the file may have a display matrix.

    Raises ClipError `unreadable`, `no_video_stream`, or `too_large`.
    """
    mp4 = read_mp4_facts(path)
    check_size(mp4.sizes)
    with open_video(path) as file:
        stream = video_stream(file)
        context = stream.codec_context
        if not context.width:  # some decoders drop width and height if max_pixels is exceeded
            check_size(coded_size(path))
        check_size([(context.width, context.height)])
        if not (context.width and context.height):
            raise ClipError("unreadable", "declares no frame size")
        rates = stream.average_rate, stream.guessed_rate, stream.base_rate
        rate = next((rate for rate in rates if rate and rate <= MAX_FRAME_RATE), Fraction(25))
        start = 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base)
        aspect = stream.sample_aspect_ratio
        packets = leading_packets(file, stream)  # before container_duration, which may seek to the end
        may_rotate = mp4.has_matrix or has_matroska_projection(path) or stream_may_rotate(packets, context)
        container_duration_s = container_duration(file, stream, start)
        return Header(
            container=file.format.name,
            width=context.width,
            height=context.height,
            pixel_aspect=plausible_pixel_aspect(aspect),
            container_duration_s=container_duration_s,
            frames_per_second=float(rate),
            orientation=first_orientation(path) if may_rotate else UPRIGHT,
            may_rotate=may_rotate,
            alpha=stream.metadata.get("alpha_mode") == "1" or has_alpha(context.format),
            aspect_in_stream=(aspect or 0) == (context.sample_aspect_ratio or 0),
            still=is_single_image(packets, stream, container_duration_s, float(rate)),
            colours=colours_of(context),
            remarks=(*colour_remarks(context), *mp4.remarks),
        )


def open_video(path: str, largest: int = MAX_PIXELS) -> Any:
    """Opens a file with PyAV, with a limit of `largest` pixels per frame and no access to other files.

    Raises ClipError `unreadable`.
    """
    try:
        return av.open(path, options={**OPEN_OPTIONS, "max_pixels": str(largest)})
    except av.ArgumentError:
        raise ClipError("unreadable", f"is a playlist, or in a format that is not supported; {FORMATS_HINT}") from None
    except (av.FFmpegError, ValueError) as error:
        raise ClipError("unreadable", f"no decoder can open it: {error_text(error)}") from None


def coded_size(path: str) -> list[tuple[int, int]]:
    """The frame size of a video without our limit; FFmpeg's own is 268 million pixels."""
    with open_video(path, (1 << 31) - 1) as file:
        context = video_stream(file).codec_context
        return [(context.width, context.height)]


def video_stream(file: Any) -> Any:
    """The best video stream that is not a cover image. Raises ClipError `no_video_stream`."""
    stream = file.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise ClipError("no_video_stream", f"{len(file.streams)} streams, none of them video")
    if file.metadata.get("major_brand") in HEIF and len(file.streams.video) > 1:
        raise ClipError("unreadable", "is an HEIC image in tiles, which is not read; convert it to jpg or png")
    return stream


def has_alpha(form: Any) -> bool:
    """Whether a pixel format, or None, may have transparency, as palettes may."""
    return form is not None and (form.has_palette or any(component.is_alpha for component in form.components))


def leading_packets(file: Any, stream: Any) -> list[Any]:
    """The first packets of a stream that are not empty."""
    packets: list[Any] = []
    try:
        for packet in file.demux(stream):
            if packet.size:
                packets.append(packet)
            if len(packets) == LEADING_PACKETS:
                break
    except (av.FFmpegError, ValueError):
        pass
    return packets


def is_single_image(packets: list[Any], stream: Any, container_duration_s: float, rate: float) -> bool:
    """Whether a stream has one frame, and its header doesn't announce more (as that of a truncated file does)."""
    shown = [packet for packet in packets if not packet.is_discard]
    if len(shown) != 1 or stream.frames > 1:
        return False
    return stream.frames == 1 or container_duration_s <= (shown[0].duration or 0) * stream.time_base + 2 / rate


def container_duration(file: Any, stream: Any, start: float) -> float:
    """The video's duration according to its container; 0 if unknown."""
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
    if file.format.name == "matroska,webm":  # counts from 0, not from its first frame
        whole -= max(0.0, start)
    if len(file.streams) == 1:
        return whole
    # This is the duration of the longest stream. If the end of the file exists, its packets say when the video ends.
    ends: dict[int, float] = {}
    for index, _, end in packet_times(file, file.streams, from_s=whole):
        ends[index] = max(end, ends.get(index, 0.0))
    video = ends.get(stream.index, 0.0)
    return video - start if video > start and max(ends.values()) >= whole - 0.1 else whole


def packet_times(file: Any, streams: Any, from_s: float | None = None) -> Iterator[tuple[int, float | None, float]]:
    """Stream, start and end in seconds of each shown packet, as far as the file can be read."""
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
    """Raises ClipError `too_large` if a frame exceeds the limits."""
    for width, height in sizes:
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            limit = f"{MAX_SIDE} pixels a side and {MAX_PIXELS // 10**6} million in all"
            raise ClipError("too_large", f"declares frames of {width}x{height}; the limit is {limit}")


def has_matroska_projection(path: str) -> bool:
    """Whether a Matroska file has a projection, which may rotate or mirror it."""
    with Path(path).open("rb") as file:
        head = file.read(1 << 16)
    return head.startswith(EBML) and PROJECTION in head.partition(CLUSTER)[0]


def stream_may_rotate(packets: list[Any], context: Any) -> bool:
    """Whether the stream itself may have an orientation: an SEI message, or EXIF as images have."""
    if context.name not in ("h264", "hevc"):
        return context.name in EXIF_CODECS
    for packet in packets:
        if orientation_sei(bytes(packet), context.name, context.extradata or b""):
            return True
        if packet.is_keyframe:
            return False
    return False


def first_orientation(path: str) -> Orientation:
    """The first frame's orientation; upright if no frame decodes."""
    try:
        with open_video(path) as file:
            return orientation_of(next(file.decode(video_stream(file)))) or UPRIGHT
    except (av.FFmpegError, StopIteration, ValueError):
        return UPRIGHT


def plausible_pixel_aspect(pixel_aspect: Fraction | None) -> float:
    """Width / height of a pixel; 1 if unknown or implausible."""
    aspect = float(pixel_aspect or 1)
    return aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else 1.0


def error_text(error: Exception) -> str:
    """An FFmpeg error's message without its number and the path."""
    return getattr(error, "strerror", None) or str(error)
