"""Reads a video's header before decoding: size, duration, rate, orientation and colours."""

from __future__ import annotations

import os
import re
import struct
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.format import Flags
from av.stream import Disposition

from data_prep.reasons import ClipError
from data_prep.video.colours import Colours, colour_remarks, colours_of
from data_prep.video.orientation import UPRIGHT, Orientation, orientation_of

MAX_SIDE = 8192
MAX_PIXELS = 64 * 10**6  # pixels; 8192x8192 is 67 million
MP4_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}  # that an mp4 may begin with
MAX_MOOV = 1 << 26  # bytes
VISUAL_ENTRY = re.compile(rb"hdlr.{8}vide.*?stsd.{8}(.{4}.{28}.{4})", re.DOTALL)
"""The first sample entry of a video track, up to width and height: ISO/IEC 14496-12, 8.5.2 and 12.1.3."""
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
NO_TIMESTAMPS = Flags.no_timestamps.value
LEADING_PACKETS = 16  # packets that are read before anything is decoded


@dataclass(frozen=True)
class Header:
    """A video as its container describes it. `container_duration_s` is 0 if unknown.

    `orientation` is that of the first frame, and `may_rotate` says that frames may have one; `aspect_in_stream`, that
    the stream itself names its pixel aspect and may change it; `still`, that the file holds one picture. `colours` and
    `remarks` are about what it signals.
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
    def display_size(self) -> tuple[float, float]:
        """Width and height in square pixels, upright."""
        width, height = self.width * self.pixel_aspect, float(self.height)
        return (height, width) if self.orientation.transposed else (width, height)


def read_header(path: str) -> Header:
    """Opens a video and decodes its first frame. Raises ClipError `unreadable`, `no_video_stream`, or `too_large`."""
    entries = mp4_sample_entries(path)
    if any(entry[4:8] == b"encv" for entry in entries):
        raise ClipError("unreadable", "is encrypted (ISO/IEC 23001-7); decrypt it first")
    check_size([struct.unpack(">HH", entry[32:36]) for entry in entries])
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
        container_duration_s = container_duration(file, stream, start)
        frame = first_frame(context, packets)
        orientation = orientation_of(frame) if frame else None
        return Header(
            container=file.format.name,
            width=context.width,
            height=context.height,
            pixel_aspect=plausible_pixel_aspect(aspect),
            container_duration_s=container_duration_s,
            frames_per_second=float(rate),
            orientation=orientation or UPRIGHT,
            may_rotate=not frame or orientation is not None,
            alpha=stream.metadata.get("alpha_mode") == "1" or has_alpha(context.format),
            aspect_in_stream=(aspect or 0) == (context.sample_aspect_ratio or 0),
            still=is_single_image(packets, stream, container_duration_s, float(rate)),
            colours=colours_of(context),
            remarks=(*colour_remarks(context), *aperture_remarks(entries), *rate_remarks(file, stream)),
        )


def mp4_sample_entries(path: str) -> list[bytes]:
    """The sample entries of the video tracks of an mp4; none for other files.

    FFmpeg overwrites their sizes with those of the stream, but a decoder may have allocated memory for them by then.
    """
    with open(path, "rb") as file:
        while len(head := file.read(8)) == 8 and (head[4:] in MP4_BOXES or file.tell() > 8):
            size, kind = struct.unpack(">I4s", head)
            if kind == b"moov":
                moov = file.read(min(size - 8, MAX_MOOV)) if size >= 8 else file.read(MAX_MOOV)
                found = VISUAL_ENTRY.finditer(moov)
                return [moov[m.start(1) : m.start(1) + max(36, *struct.unpack_from(">I", m[1]))] for m in found]
            size = struct.unpack(">Q", file.read(8))[0] - 8 if size == 1 else size
            if size < 8:
                break
            file.seek(size - 8, os.SEEK_CUR)
    return []


def aperture_remarks(entries: list[bytes]) -> list[str]:
    """A remark for each sample entry that says that only a part of each frame is to be shown: 12.1.4."""
    remarks: list[str] = []
    for entry in entries:
        place = entry.find(b"clap")
        if 36 <= place <= len(entry) - 20:
            width_n, width_d, height_n, height_d = struct.unpack_from(">4I", entry, place + 4)
            width, height = struct.unpack(">HH", entry[32:36])
            if width_d and height_d and (width_n / width_d, height_n / height_d) < (width, height):
                part = f"{width_n / width_d:g}x{height_n / height_d:g}"
                remarks.append(
                    f"clean_aperture: of its {width}x{height} pixels {part} are to be shown, and all are taken"
                )
    return remarks


def rate_remarks(file: Any, stream: Any) -> list[str]:
    """A remark on a raw stream, for which FFmpeg assumes a frame rate."""
    if not file.format.flags & NO_TIMESTAMPS or not stream.average_rate:
        return []
    assumed, signalled = float(stream.average_rate), float(stream.codec_context.framerate or 0)
    says = f", though it says {signalled:g}" if signalled not in (0.0, assumed) else ""
    return [f"no_timestamps: has no timestamps, {assumed:g} frames per second are assumed{says}"]


def open_video(path: str, largest: int = MAX_PIXELS) -> Any:
    """Opens a file with PyAV, with a limit of `largest` pixels per frame and no access to other files.

    Raises ClipError `unreadable`.
    """
    try:
        return av.open(path, options={**OPEN_OPTIONS, "max_pixels": str(largest)})
    except av.ArgumentError:
        raise ClipError(
            "unreadable", f"is in a format that is not supported, or is a playlist; {FORMATS_HINT}"
        ) from None
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
    with suppress(av.FFmpegError, ValueError):
        for packet in file.demux(stream):
            if packet.size:
                packets.append(packet)
            if len(packets) == LEADING_PACKETS:
                break
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
    with suppress(av.FFmpegError, ValueError):
        file.seek(file.duration, backward=True)
        for packet in file.demux():
            stamp = packet.dts if packet.pts is None else packet.pts
            if packet.size and not packet.is_discard and stamp is not None:
                end = float((stamp + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream_index] = max(end, ends.get(packet.stream_index, 0.0))
    video = ends.get(stream.index, 0.0)
    return video - start if video > start and max(ends.values()) >= whole - 0.1 else whole


def check_size(sizes: list[tuple[int, int]]) -> None:
    """Raises ClipError `too_large` if a frame exceeds the limits."""
    for width, height in sizes:
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            limit = f"{MAX_SIDE} pixels a side and {MAX_PIXELS // 10**6} million in all"
            raise ClipError("too_large", f"declares frames of {width}x{height}; the limit is {limit}")


def first_frame(context: Any, packets: list[Any]) -> Any:
    """The first frame that decodes; None if there is none in these packets."""
    context.thread_count = 1
    for packet in (*packets, None):
        with suppress(av.FFmpegError, ValueError):
            if frames := context.decode(packet):
                return frames[0]
    return None


def plausible_pixel_aspect(pixel_aspect: Fraction | None) -> float:
    """Width / height of a pixel; 1 if unknown or implausible."""
    aspect = float(pixel_aspect or 1)
    return aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else 1.0


def error_text(error: Exception) -> str:
    """An FFmpeg error's message without its number and the path."""
    return getattr(error, "strerror", None) or str(error)
