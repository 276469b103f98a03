"""FrameReader, the interface of both video readers, and PyAvReader, which reads every supported video.

A reader gives the frames that are on screen at given times, each resized as soon as it is decoded. A frame is on screen
until the next one's time, as in players; time zero is the first frame's timestamp. PyAvReader seeks, checks where it
arrived, and holds two raw frames, however long the video is. DecordReader (decord_reader.py) reads ordinary videos.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import av
import numpy as np

from data_prep.buckets import TIMESTAMP_ERROR_S
from data_prep.reasons import ClipError
from data_prep.video import colours
from data_prep.video.damage import DamagedFrame, checked_frames
from data_prep.video.orientation import UPRIGHT, Orientation, orientation_of
from data_prep.video.probe import Header, check_size, error_text, open_video, plausible_pixel_aspect, video_stream
from data_prep.video.timeline import Clock

Transform = Callable[[np.ndarray], np.ndarray]
"""Resizes a frame uint8 `H W 3`, already upright, to the clip's size."""
DECODE_AHEAD_S = 10.0  # decoding on is about as quick as a seek that lands at the keyframe before
SEEK_MARGIN_S = {"mov,mp4,m4a,3gp,3g2,mj2": 0.0, "matroska,webm": 0.0, "mpegts": 5.0}
"""Containers in which a seek is sound, and how many seconds early it has to aim: MPEG-TS has no index of keyframes."""
COLLECT_EVERY = 8  # frames with side data, each of which PyAV ties into a cycle
REORDERED = 64  # more frames than a decoder holds back
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own drop the transparency of WebM
DECODERS = {"vp9": "libvpx-vp9"}  # FFmpeg's own does not notice damage


class TimedFrame(NamedTuple):
    """A decoded frame, its seconds since the first one, its orientation, and its pixel aspect (width / height)."""

    time: float
    frame: Any
    orientation: Orientation
    pixel_aspect: float


class FrameReader(Protocol):
    """Reads a clip's frames from one file; DecordReader and PyAvReader give the same."""

    def frames(self, due: np.ndarray, transform: Transform) -> list[np.ndarray]:
        """The transformed frames on screen at rising times; fewer if the video ends earlier."""
        ...


class PyAvReader:
    """A FrameReader by PyAV. It decodes forward to near times, seeks to far ones, and rewinds if a seek fails."""

    def __init__(self, path: str, header: Header, seekable: bool = True):
        self.path, self.header, self.seekable = path, header, seekable
        self.stream: Iterator[TimedFrame] | None = None
        self.before: TimedFrame | None = None  # the last frame whose time has passed, and the next one
        self.after: TimedFrame | None = None
        self.start_s: float | None = None  # the first frame's timestamp
        self.end = 0.0  # of the video, once it was reached
        self.pixel_aspect = header.pixel_aspect  # of the upright frame that `transform` is called with
        self.aspects: dict[int, float] = {}  # pixel aspects by timestamp, of frames that are not shown yet
        self.file: Any = None

    def frames(self, due: np.ndarray, transform: Transform) -> list[np.ndarray]:
        """The transformed frames on screen at `due`; fewer if the video ends earlier. Raises ClipError `corrupt`."""
        refusal = ClipError("corrupt", "no frame of it decodes")
        if self.end and due[-1] > self.end:  # known to end earlier: a broken file's later clips need no decoding
            return []
        for seeking in (False, True):
            try:
                # Continue, seek or rewind, whichever is fastest and safe. After damage before the clip: seek past it.
                if seeking or not self.can_continue_to(due[0]):
                    arrived = (seeking or due[0] > DECODE_AHEAD_S) and self.seek_to(due[0])
                    if seeking and not arrived:
                        break
                    if not arrived:
                        self.rewind()
                return self.collect(due, transform)
            except (av.FFmpegError, ValueError) as error:
                refusal = ClipError("corrupt", decode_failure(self.before and self.before.time, error_text(error)))
                if self.before and self.before.time >= due[0]:
                    break
        self.close()
        raise refusal

    def first_timestamp(self) -> float | None:
        """The timestamp of the first frame that can be decoded, in seconds, if any."""
        if self.start_s is None:
            try:
                self.rewind()
                self.advance()
            except (av.FFmpegError, ValueError):
                self.close()
        return self.start_s

    def collect(self, due: np.ndarray, transform: Transform) -> list[np.ndarray]:
        frames: list[np.ndarray] = []
        latest: tuple[TimedFrame, np.ndarray] | None = None  # a frame that is due twice is transformed once
        for moment in due:
            while self.after is None or self.after.time <= moment + TIMESTAMP_ERROR_S:
                if not self.advance():
                    break
            shown = self.on_screen(moment)
            if shown and isinstance(shown.frame, DamagedFrame):
                raise ClipError("corrupt", decode_failure(shown.frame.last_good_s, shown.frame.why))
            if shown is None:
                return frames
            if latest is None or latest[0] is not shown:
                self.pixel_aspect = shown.pixel_aspect ** (-1 if shown.orientation.transposed else 1)
                latest = shown, transform(shown.orientation.upright(self.to_rgb(shown.frame)))
            frames.append(latest[1])
        return frames

    def on_screen(self, moment: float) -> TimedFrame | None:
        """The last frame whose time has come, at the earliest the first; None past the video's end."""
        if self.after is None:
            return self.before if moment < self.end else None
        return self.before or self.after

    def advance(self) -> bool:
        """Decodes the next frame; False at the end."""
        if self.stream is None:
            return False
        if self.after is not None:
            self.before = self.after
        self.after = next(self.stream, None)
        if self.after is None:
            self.stream = None
            self.end = self.before.time + self.frame_duration(self.before.frame) if self.before else 0.0
        return self.after is not None

    def rewind(self) -> None:
        """Opens the file again, before its first frame."""
        self.close()
        self.file = open_video(self.path)
        self.stream = self.decoded_frames()

    def can_continue_to(self, moment: float) -> bool:
        """Whether a moment is ahead, and near enough to decode up to it."""
        if self.after is None or self.stream is None:
            return False
        return (self.before or self.after).time <= moment <= self.after.time + DECODE_AHEAD_S

    def seek_to(self, moment: float) -> bool:
        """Seeks to the keyframe before a moment; False if it arrived elsewhere."""
        early = SEEK_MARGIN_S.get(self.header.container)
        if early is None or not self.seekable:
            return False
        if self.start_s is None:
            self.rewind()
            self.advance()
        self.rewind()
        try:
            stream = video_stream(self.file)
            aim = (self.start_s or 0.0) + moment - early
            self.file.seek(int(aim / stream.time_base), stream=stream, backward=True)
            self.stream = self.decoded_frames(after_seek=True)
            return self.advance() and self.after is not None and self.after.time <= moment
        except (av.FFmpegError, ValueError):
            return False

    def frame_duration(self, frame: Any) -> float:
        """Seconds that a frame is shown; 0 for a damaged one."""
        if isinstance(frame, DamagedFrame):
            return 0.0
        return float(frame.duration * (frame.time_base or 0)) or self.header.frame_s

    def decoded_frames(self, after_seek: bool = False) -> Iterator[TimedFrame]:
        """Frames with times that never fall.

        After a seek they begin at a keyframe, because earlier frames may refer to pictures that were not decoded, and
        end at a frame without a timestamp.
        """
        stream = video_stream(self.file)
        tick, clock, last_good_s = float(stream.time_base), Clock(self.header.frame_s), None
        # A decoder of our own choice does not see the container's display matrix.
        upright = orientation = self.header.orientation if self.decoder_name(stream) else UPRIGHT
        oriented = 0
        for frame in self.checked_frames(stream):
            is_damaged = isinstance(frame, DamagedFrame)
            if after_seek and clock.last is None and (is_damaged or not frame.key_frame):
                continue
            if not is_damaged:
                check_size([(frame.width, frame.height)])
            # AVI has no presentation times, only decoding times.
            stamp = frame.dts if self.header.container == "avi" else frame.pts
            if stamp is None and after_seek:
                return
            time = clock.time(None if stamp is None else stamp * tick)
            if time is None:
                continue
            zero = self.start_s = time if self.start_s is None else self.start_s
            aspect = self.pixel_aspect_of(frame)
            if is_damaged:
                yield TimedFrame(time - zero, replace(frame, last_good_s=last_good_s), orientation, aspect)
                continue
            last_good_s = time - zero
            # A display orientation message of H.264 or HEVC holds until the next keyframe; FFmpeg gives it once.
            has_orientation = self.header.may_rotate or bool(frame.rotation)
            own = orientation_of(frame) if has_orientation else None
            orientation = own or (upright if frame.key_frame else orientation)
            oriented += has_orientation
            if has_orientation and oriented % COLLECT_EVERY == 0:
                gc.collect()
            yield TimedFrame(time - zero, frame, orientation, aspect)

    def checked_frames(self, stream: Any) -> Iterator[Any]:
        """Frames in display order, or DamagedFrame in their place."""
        name = self.decoder_name(stream)
        context: Any = av.CodecContext.create(name, "r") if name else stream.codec_context
        context.thread_count = 1  # the other cores have work of their own

        def note_aspect(packet: Any) -> None:
            if self.header.aspect_in_stream and packet.pts is not None:
                self.aspects[packet.pts] = plausible_pixel_aspect(context.sample_aspect_ratio)

        return checked_frames(self.file, stream, context, note_aspect)

    def decoder_name(self, stream: Any) -> str | None:
        """The decoder that is used instead of FFmpeg's choice, if any."""
        return (ALPHA_DECODERS if self.header.alpha else DECODERS).get(stream.codec_context.name)

    def to_rgb(self, frame: Any) -> np.ndarray:
        """A frame uint8 `H W 3`, transparency on black."""
        image = colours.to_rgb(frame, self.header.colours, "rgba" if self.header.alpha else "rgb24")
        return on_black(image) if self.header.alpha else image

    def pixel_aspect_of(self, frame: Any) -> float:
        """Width / height of a frame's pixels; a stream may change it."""
        aspect = self.aspects.pop(frame.pts, self.header.pixel_aspect)
        if len(self.aspects) > REORDERED:  # of frames that were never shown
            self.aspects.clear()
        return aspect

    def close(self) -> None:
        """Closes the file and releases its frames."""
        self.stream = self.before = self.after = None
        self.aspects = {}
        if self.file is not None:
            self.file.close()
            self.file = None


def decode_failure(last_good_s: float | None, why: str) -> str:
    """The message for damage after the last undamaged frame, if any."""
    return f"decoding fails {'at the first frame' if last_good_s is None else f'at {last_good_s:.2f} s'}: {why}"


def on_black(rgba: np.ndarray) -> np.ndarray:
    """uint8 `H W 4` with straight alpha to `H W 3`."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)
