"""decord reader: the same frames as PyAV's, for a clip near the beginning of an ordinary H.264 video.

decord (its maintained fork, decord2) reports no damage, opens playlists, seeks wrongly in open GOPs, and decodes ahead
without a bound (dmlc/decord issues 83, 157, 197, 208). So all packets are checked first, as the timeline reads them,
and decord gets only small, ordinary videos, read forward from the first frame. Its FFmpeg prints damage that it
conceals: if it prints or raises anything, PyAV reads the clip, as it reads all other videos.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.buckets import TIMESTAMP_ERROR_S
from data_prep.video.colours import HD_HEIGHT, HD_WIDTH, UNKNOWN
from data_prep.video.damage import captured_stderr, zero_run
from data_prep.video.probe import Header
from data_prep.video.readers import DECODE_AHEAD_S, Transform


def import_decord() -> Any:
    """Imports decord without making its libraries global.

    The import would load them, and all installed CUDA libraries, for the whole process; PyAV and later imports would
    then call decord's FFmpeg instead of their own.
    """
    load = ctypes.CDLL

    def load_alone(name: str, mode: int = 0) -> ctypes.CDLL:
        if "decord" not in Path(name).name:
            raise OSError("CUDA is not used")
        return load(name)

    ctypes.CDLL = load_alone
    try:
        import decord
    finally:
        ctypes.CDLL = load
    decord.logging.set_level(decord.logging.INFO)  # at this level its FFmpeg prints what it conceals
    return decord


decord = import_decord()
AHEAD_BYTES = 256 << 20  # of raw frames
CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
FORMATS = ("yuv420p", "yuvj420p")
PLAIN_COLOURS = {1, UNKNOWN, 5, 6}  # BT.709, not named, BT.601: matrix, primaries and transfer (ISO/IEC 23091-2)
PROGRESSIVE = 1  # AVFieldOrder
SLICES, SEI, DISPLAY_ORIENTATION = (1, 5), 6, 47  # types of NAL units, and of an SEI message: ITU-T H.264, 7.3
UNITS = {*SLICES, SEI, 9, 12}  # 9 delimits pictures, 12 fills up
CONVERSION = ("[in @ ", "[swscaler @ ")  # they print messages on undamaged frames too


class NotOrdinaryError(Exception):
    """decord may not read this file or clip as PyAV does."""


class DecordReader:
    """A FrameReader by decord, of a video whose packets passed a PacketCheck that gave `times`."""

    def __init__(self, path: str, header: Header, times: np.ndarray):
        self.path, self.header, self.times = path, header, times

    def frames(self, due: np.ndarray, transform: Transform) -> list[np.ndarray]:
        """The transformed frames on screen at rising times. Raises NotOrdinaryError."""
        if due[0] > DECODE_AHEAD_S or due[-1] >= self.times[-1]:
            raise NotOrdinaryError("PyAV seeks to late clips, and knows when the last frame ends")
        indices = np.maximum(np.searchsorted(self.times, due + TIMESTAMP_ERROR_S, side="right") - 1, 0)
        with captured_stderr() as lines:
            try:
                frames, reason = self.read(indices, transform), ""
            except Exception as error:  # PyAV finds out what is wrong
                frames, reason = [], str(error) or type(error).__name__
        lines = [line for line in lines if not line.startswith(CONVERSION)]
        if reason or lines:
            raise NotOrdinaryError(reason or lines[0])
        return frames

    def read(self, indices: np.ndarray, transform: Transform) -> list[np.ndarray]:
        """The transformed frames of rising indices."""
        reader = decord.VideoReader(self.path, num_threads=1)
        if len(reader) != len(self.times):
            raise NotOrdinaryError(f"{len(reader)} frames, and {len(self.times)} packets")
        frames: list[np.ndarray] = []
        keys, position = np.array(reader.get_key_indices()), 0
        for index, repeats in zip(*np.unique(indices, return_counts=True), strict=True):
            skip_to(reader, keys, position, int(index))
            frame = reader.next().asnumpy()
            position = int(index) + 1
            if frame.shape != (self.header.height, self.header.width, 3):  # of narrow frames the rows are padded
                raise NotOrdinaryError(f"a frame of {frame.shape}")
            frames += [transform(frame)] * int(repeats)
        return frames


def skip_to(reader: Any, keys: np.ndarray, position: int, index: int) -> None:
    """Advances to a frame. decord seeks if it skips past a keyframe, so keyframes are decoded one by one."""
    while position < index:
        ahead = keys[np.searchsorted(keys, position, side="right") :]
        stop = min(index, int(ahead[0]) - 1) if len(ahead) else index
        if stop > position:
            reader.skip_frames(stop - position)
            position = stop
        else:
            reader.next()
            position += 1


class PacketCheck:
    """Decides from a video's packets, as read_timeline reads them, whether decord reads it like PyAV."""

    def __init__(self, header: Header):
        self.header = header
        self.max_frames = AHEAD_BYTES // (header.width * header.height * 3)
        self.stamps: list[int] = []
        self.decoded = float("-inf")
        self.tick = 0.0
        self.is_complete = False  # the last packet was the empty one
        self.reason = ""
        """Why decord must not read it; empty if it may."""
        if header.container not in CONTAINERS or header.alpha or header.may_rotate or header.remarks:
            self.reason = "another container, transparency, an orientation, or what has a remark"

    def add(self, stream: Any, packet: Any) -> None:
        """Checks the next packet."""
        self.is_complete = not packet.size
        if packet.size and not self.reason:
            if not self.stamps:
                self.tick, self.reason = float(stream.time_base), stream_objection(stream.codec_context, self.header)
            self.reason = self.reason or self._objection(packet, stream.codec_context)
            self.stamps.append(packet.pts)
            self.decoded = self.decoded if packet.dts is None else packet.dts

    def _objection(self, packet: Any, context: Any) -> str:
        if packet.is_discard or packet.is_corrupt or packet.has_sidedata("new_extradata"):
            return "packets that are not shown, damaged, or change the stream"
        if packet.pts is None or (packet.dts is not None and packet.dts <= self.decoded):
            return "timestamps that are absent or do not rise"
        content = bytes(packet)
        if not is_one_picture(content, context.extradata[4] % 4 + 1, not self.stamps) or zero_run(content, "h264"):
            return "a packet that is not one picture"
        if len(self.stamps) == self.max_frames or not (self.stamps or packet.is_keyframe):
            return f"more than {self.max_frames} frames, or no keyframe at the beginning"
        return ""

    def times(self) -> np.ndarray:
        """When each frame is shown, in seconds since the first one. Raises NotOrdinaryError."""
        if self.reason or not self.is_complete:
            raise NotOrdinaryError(self.reason or "an error ends its packets")
        order = np.sort(np.array(self.stamps))
        if len(order) < 2 or order[0] != self.stamps[0] or not (np.diff(order) > 0).all():
            raise NotOrdinaryError("frames that share a timestamp, or are shown before the first keyframe")
        return order * self.tick - order[0] * self.tick


def stream_objection(context: Any, header: Header) -> str:
    """Why a stream is not progressive 8-bit H.264 in colours that both decoders convert; empty if it is."""
    if context.name != "h264" or context.pix_fmt not in FORMATS or context.field_order != PROGRESSIVE:
        return "another codec or pixel format, or interlaced"
    colours, is_hd = header.colours, context.width >= HD_WIDTH or context.height >= HD_HEIGHT
    if not {*vars(colours).values()} <= PLAIN_COLOURS or (colours.matrix == UNKNOWN and is_hd):
        return "other colours than SDR by BT.601 or BT.709, or HD whose matrix is not named"
    extradata = context.extradata or b""
    if len(extradata) < 7 or extradata[0] != 1 or extradata[5] & 31 != 1:
        return "not one set of parameters, in an avcC"
    return ""


def is_one_picture(content: bytes, lengths: int, is_first: bool) -> bool:
    """Whether a packet is the slices of one picture, and no later one may have an orientation message."""
    place = begins = 0
    while place + lengths < len(content):
        size = int.from_bytes(content[place : place + lengths], "big")
        unit = content[place + lengths : place + lengths + size]
        place += lengths + size
        if len(unit) < 2 or unit[0] & 31 not in UNITS:
            return False
        if unit[0] & 31 == SEI and DISPLAY_ORIENTATION in unit and not is_first:  # the header knows the first's
            return False
        begins += unit[0] & 31 in SLICES and unit[1] >> 7  # its first macroblock is the picture's
    return begins == 1 and place == len(content)
