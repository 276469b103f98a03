"""Decodes packets; frames that are damaged, or refer to damaged ones, become DamagedFrame.

A frame is undamaged if its decoder raises no error and sets no flag, its packet has no run of zeros, and the same is
true of all frames since the keyframe before. H.264, MPEG-1, -2 and -4 and their relatives flag what they
conceal. libvpx reports damaged VP9, which FFmpeg's own decoder does not; FFV1 only logs it. HEVC, VP8 and AV1 report
little: their packets are searched for runs of zeros, as lost sectors and unfinished downloads leave them.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import av
import av.logging
import cv2
import numpy as np

from data_prep.video.probe import error_text

ZEROS = re.compile(rb"\0{16}\0*[^\0\1]")
"""In a NAL unit, where no three zeros may follow each other; before a start code (a 1) they may be padding."""
ZERO_RUN_BYTES = {"vp8": 256, "vp9": 256, "av1": 256, "hevc": 64}
"""So many zeros in a row (for HEVC, at a packet's end) are not data: a disk sector has 512 bytes."""
REORDER = 64  # packets that may be decoded before the picture of one of them is shown; H.264 allows 16 frames
EXTRA, PADDING = re.compile(r"(\d+) extraneous bytes before marker 0xd9"), 16  # bytes that cameras fill up with
CONCEALED = "the decoder conceals damage"
STRICT_CODECS = {"mjpeg", "wmv1", "wmv2"}
"""Decoders that report more damage with `err_detect=explode`, and none on undamaged files."""


@dataclass(frozen=True)
class DamagedFrame:
    """Takes the place of a damaged frame. `pts` and `dts` are in the stream's time base."""

    why: str
    pts: int | None
    dts: int | None
    last_good_s: float | None = None
    """Time of the last undamaged frame before it, in seconds since the first one."""


def checked_frames(
    file: Any, stream: Any, context: Any, decoded: Callable[[Any], None] = lambda packet: None
) -> Iterator[Any]:
    """Frames in display order, with DamagedFrame in place of damaged ones.

    `decoded` is called with each packet once it is decoded, before its frame is yielded. Raises av.FFmpegError if the
    file can't be read further.
    """
    codec = stream.codec_context.codec.canonical_name
    if codec in STRICT_CODECS:
        context.options = {**context.options, "err_detect": "explode"}
    watch = DamageTracker()
    for packet in file.demux(stream):
        watch.add_packet(packet, packet_damage(packet, codec))
        frames, error = decode(context, packet)
        decoded(packet)
        if error:
            watch.distrust(time_of(packet), error)
        yield from watch.checked(frames)
        if error and not packet.is_discard:
            watch.lost.append(DamagedFrame(error, packet.pts, packet.dts))
    yield from watch.lost


def decode(context: Any, packet: Any) -> tuple[list[Any], str]:
    """The frames that a packet completes, and the decoder's error message, if any."""
    listens = context.name == "ffv1"
    try:
        if not listens:
            return context.decode(packet), ""
        av.logging.set_level(av.logging.ERROR)
        with av.logging.Capture() as said:
            frames = context.decode(packet)
        return ([], said[0][2].strip()) if said else (frames, "")
    except av.FFmpegError as error:
        return [], error_text(error)
    finally:
        if listens:
            av.logging.set_level(None)


def packet_damage(packet: Any, codec: str) -> str:
    """Damage that a packet's bytes show; empty if none."""
    if codec not in ZERO_RUN_BYTES and codec != "h264":
        return ""
    if codec == "hevc" and packet.is_corrupt:  # a transport stream that lost a packet; H.264's decoder knows better
        return "the container reports a lost packet"
    return zero_run(bytes(packet), codec)


def zero_run(content: bytes, codec: str) -> str:
    """A message if a compressed frame has a run of zeros that is not data; empty if not."""
    found = codec in ("h264", "hevc") and bytes(16) in content and bool(ZEROS.search(content))
    if codec in ZERO_RUN_BYTES:
        length = ZERO_RUN_BYTES[codec]
        found = found or bytes(length) in (content[-length:] if codec == "hevc" else content)
    return "a run of zeros in the compressed picture" if found else ""


def jpeg_damage(content: bytes) -> str:
    """libjpeg's warning on a JPEG, such as `Premature end of JPEG file`; empty if there is none.

    Pillow hides these warnings and FFmpeg misses many of them. OpenCV prints them: they are read from its stderr. An
    eighth of the size in grey is enough to decode all bits.
    """
    with captured_stderr() as lines:
        cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
    for line in lines:
        padding = EXTRA.search(line)
        if ("Corrupt JPEG" in line or "Premature end" in line) and not (padding and int(padding[1]) <= PADDING):
            return line.strip()
    return ""


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Captures what C libraries print on stderr, at most 64 KiB; the list is filled on exit."""
    lines: list[str] = []
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)  # output beyond the pipe's size is dropped
    stderr = os.dup(2)
    try:
        os.dup2(write, 2)
        yield lines
    finally:
        os.dup2(stderr, 2)
        with suppress(BlockingIOError):
            lines += os.read(read, 1 << 16).decode(errors="replace").splitlines()
        for number in (read, write, stderr):
            os.close(number)


class DamageTracker:
    """Tracks which packets, and so which frames, are damaged or refer to damaged ones."""

    def __init__(self) -> None:
        self.recent: deque[tuple[int | None, bool]] = deque(maxlen=REORDER)  # time, and whether it is a keyframe
        self.suspect: dict[int | None, str] = {}  # time -> why
        self.why = ""  # why all packets up to the next keyframe are suspect
        self.lead: int | None = None  # frames shown before this keyframe may refer to damaged ones before it
        self.lead_why = ""
        self.lost: list[DamagedFrame] = []  # frames that the decoder did not return
        self.shown = False

    def add_packet(self, packet: Any, hole: str) -> None:
        """Records the next packet in decoding order."""
        if not packet.size:
            return
        time = time_of(packet)
        if packet.is_keyframe:
            self.lead, self.lead_why, self.why = time, self.why, ""
        self.why = hole or self.why
        self.recent.append((time, bool(packet.is_keyframe)))
        leads = time is not None and self.lead is not None and time < self.lead
        if why := self.why or (self.lead_why if leads else ""):
            self.suspect[time] = why

    def distrust(self, time: int | None, why: str) -> None:
        """Marks all packets from this one up to the next keyframe, in decoding order, as suspect."""
        packets = list(self.recent)
        known = [other for other, _ in packets]
        key = None
        for other, is_key in packets[known.index(time) if time in known else 0 :]:  # AVI has no times: all of them
            key = other if is_key and other != time else key
            if key is None or (other is not None and other < key):
                self.suspect[other] = why
        if key is None:
            self.why = self.why or why

    def checked(self, frames: list[Any]) -> Iterator[Any]:
        """The decoded frames, with DamagedFrame in place of suspect ones."""
        for frame in frames:
            time = time_of(frame)
            if frame.is_corrupt:
                if not self.shown and not any(is_key for _, is_key in self.recent):
                    continue  # a recording that begins in the middle of a group of pictures
                self.distrust(time, CONCEALED)
            while self.lost and (time is None or (time_of(self.lost[0]) or 0) < time):
                self.suspect.pop(time_of(self.lost[0]), None)
                yield self.lost.pop(0)
            self.shown = True
            why = self.suspect.pop(time, CONCEALED if frame.is_corrupt else "")
            yield DamagedFrame(why, frame.pts, frame.dts) if why else frame
        while len(self.lost) > REORDER:
            yield self.lost.pop(0)


def time_of(place: Any) -> int | None:
    """The presentation time of a packet or frame; the decoding time if it has none."""
    return place.dts if place.pts is None else place.pts
