"""decord reader: the same frames as PyAV's, of a clip near the beginning of an ordinary H.264 video.

decord (its maintained fork, decord2) reports no damage, opens playlists, seeks wrong in open groups of pictures, and
decodes ahead without a bound (dmlc/decord issues 83, 157, 197, 208). So PyAV looks at all packets first, only what is
ordinary and small goes to decord, and it reads forward from the first frame. Its FFmpeg prints what it conceals: where
it prints or raises anything at all, PyAV decides. Every other video is PyAV's.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.buckets import TIMESTAMP_ERROR_S
from data_prep.video.colours import HD_HEIGHT, HD_WIDTH, UNKNOWN
from data_prep.video.damage import captured_stderr, zero_run
from data_prep.video.orientation import DISPLAY_ORIENTATION, sei_types
from data_prep.video.probe import Header, open_video, video_stream
from data_prep.video.readers import DECODE_AHEAD_S, Fit


def decord_alone() -> Any:
    """decord, with its libraries for itself.

    Its import loads them, and all of CUDA's that are installed, for the whole process. PyAV and whatever is imported
    later would then call decord's FFmpeg in place of their own.
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
    decord.logging.set_level(decord.logging.INFO)  # at which its FFmpeg says what it conceals
    return decord


decord = decord_alone()
AHEAD_BYTES = 256 << 20  # of raw frames
CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
FORMATS = ("yuv420p", "yuvj420p")
PLAIN_COLOURS = {1, UNKNOWN, 5, 6}  # BT.709, not named, BT.601: matrix, primaries and transfer (ISO/IEC 23091-2)
PROGRESSIVE = 1  # AVFieldOrder
SLICES, SEI = (1, 5), 6
UNITS = {*SLICES, SEI, 9, 12}  # types of NAL units; 9 delimits pictures, 12 fills up
CONVERSION = ("[in @ ", "[swscaler @ ")  # say something of sound frames too, when they are converted to RGB


class NotOrdinaryError(Exception):
    """decord is not sure of this file or clip."""


class DecordReader:
    """decord. Raises NotOrdinaryError where a video is not ordinary; its message says why."""

    def __init__(self, path: str, header: Header):
        self.path, self.header = path, header
        self.times = ordinary_times(path, header)

    def frames(self, due: np.ndarray, fit: Fit) -> list[np.ndarray]:
        """The fitted frames on screen at `due`, which rises. Raises NotOrdinaryError."""
        if due[0] > DECODE_AHEAD_S or due[-1] >= self.times[-1]:
            raise NotOrdinaryError("PyAV seeks to what is far, and knows when the last frame ends")
        indices = np.maximum(np.searchsorted(self.times, due + TIMESTAMP_ERROR_S, side="right") - 1, 0)
        with captured_stderr() as said:
            try:
                fitted, why = self.read(indices, fit), ""
            except Exception as error:  # whatever decord raises, PyAV finds out what is wrong
                fitted, why = [], str(error) or type(error).__name__
        said = [line for line in said if not line.startswith(CONVERSION)]
        if why or said:
            raise NotOrdinaryError(why or said[0])
        return fitted

    def read(self, indices: np.ndarray, fit: Fit) -> list[np.ndarray]:
        """The fitted frames of rising indices."""
        reader = decord.VideoReader(self.path, num_threads=1)
        if len(reader) != len(self.times):
            raise NotOrdinaryError(f"{len(reader)} frames, and {len(self.times)} packets")
        fitted: list[np.ndarray] = []
        keys, position = np.array(reader.get_key_indices()), 0
        for index, repeats in zip(*np.unique(indices, return_counts=True), strict=True):
            skip(reader, keys, position, int(index))
            frame = reader.next().asnumpy()
            position = int(index) + 1
            if frame.shape != (self.header.height, self.header.width, 3):  # narrow frames: the padding of their rows
                raise NotOrdinaryError(f"a frame of {frame.shape}")
            fitted += [fit(frame)] * int(repeats)
        return fitted


def skip(reader: Any, keys: np.ndarray, position: int, index: int) -> None:
    """Goes on to a frame. decord seeks when it skips past a keyframe, so it is led there frame by frame."""
    while position < index:
        ahead = keys[np.searchsorted(keys, position, side="right") :]
        stop = min(index, int(ahead[0]) - 1) if len(ahead) else index
        if stop > position:
            reader.skip_frames(stop - position)
            position = stop
        else:
            reader.next()
            position += 1


def ordinary_times(path: str, header: Header) -> np.ndarray:
    """When the frames of an ordinary video are shown, in seconds since the first one. Raises NotOrdinaryError."""
    if header.container not in CONTAINERS or header.alpha or header.may_rotate or header.remarks:
        raise NotOrdinaryError("another container, transparency, an orientation, or what has a remark")
    most = AHEAD_BYTES // (header.width * header.height * 3)
    stamps: list[int] = []
    decoded = float("-inf")
    with open_video(path) as file:
        stream = video_stream(file)
        check_stream(stream.codec_context, header)
        tick, lengths = float(stream.time_base), stream.codec_context.extradata[4] % 4 + 1
        for packet in file.demux(stream):
            if not packet.size:
                continue
            if packet.is_discard or packet.is_corrupt or packet.has_sidedata("new_extradata"):
                raise NotOrdinaryError("packets that are not shown, damaged, or change the stream")
            if packet.pts is None or (packet.dts is not None and packet.dts <= decoded):
                raise NotOrdinaryError("timestamps that are absent or do not rise")
            if not holds_picture(content := bytes(packet), lengths) or zero_run(content, "h264"):
                raise NotOrdinaryError("a packet that is not one picture")
            if len(stamps) == most or not (stamps or packet.is_keyframe):
                raise NotOrdinaryError(f"more than {most} frames, or no keyframe at the beginning")
            stamps.append(packet.pts)
            decoded = decoded if packet.dts is None else packet.dts
    order = np.sort(np.array(stamps))
    if len(order) < 2 or order[0] != stamps[0] or not (np.diff(order) > 0).all():
        raise NotOrdinaryError("frames that share a timestamp, or are shown before the first keyframe")
    return order * tick - order[0] * tick


def check_stream(context: Any, header: Header) -> None:
    """Raises NotOrdinaryError where it is not progressive H.264 of 8 bits in colours that both decoders convert."""
    if context.name != "h264" or context.pix_fmt not in FORMATS or context.field_order != PROGRESSIVE:
        raise NotOrdinaryError("another codec or pixel format, or interlaced")
    colours, is_hd = header.colours, context.width >= HD_WIDTH or context.height >= HD_HEIGHT
    if not {*vars(colours).values()} <= PLAIN_COLOURS or (colours.matrix == UNKNOWN and is_hd):
        raise NotOrdinaryError("other colours than SDR by BT.601 or BT.709, or HD whose matrix is not named")
    extradata = context.extradata or b""
    if len(extradata) < 7 or extradata[0] != 1 or extradata[5] & 31 != 1:
        raise NotOrdinaryError("not one set of parameters, in an avcC")


def holds_picture(content: bytes, lengths: int) -> bool:
    """Whether a packet is the slices of one picture, and says nothing of what follows: ITU-T H.264, 7.3."""
    place = begins = 0
    while place + lengths < len(content):
        size = int.from_bytes(content[place : place + lengths], "big")
        unit = content[place + lengths : place + lengths + size]
        place += lengths + size
        if len(unit) < 2 or unit[0] & 31 not in UNITS:
            return False
        if unit[0] & 31 == SEI and DISPLAY_ORIENTATION in sei_types(unit[1:]):
            return False
        begins += unit[0] & 31 in SLICES and unit[1] >> 7  # its first macroblock is the picture's
    return begins == 1 and place == len(content)
