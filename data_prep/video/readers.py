"""PyAV reader: the frames that are on screen at the times that are due, each fitted as soon as it is decoded.

A frame is on screen until the next one's time, as in players. Time zero is the first frame's timestamp. The reader
seeks, checks where it arrived, and holds two raw frames, however long the video is. decord gives the same frames of
ordinary videos (decord_reader.py); PyAV reads all others, and whatever decord is not sure of.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import av
import numpy as np

from data_prep.buckets import TIMESTAMP_ERROR_S
from data_prep.reasons import ClipError
from data_prep.video import colours
from data_prep.video.damage import DamagedFrame, checked_frames
from data_prep.video.orientation import UPRIGHT, Orientation, orientation_of
from data_prep.video.probe import Header, check_size, error_text, open_video, plausible_pixel_aspect, video_stream

Fit = Callable[[np.ndarray], np.ndarray]
"""A frame uint8 `H W 3`, turned upright, to one of the clip's size."""
DECODE_AHEAD_S = 10.0  # decoding on is about as quick as a seek that lands at the keyframe before
SEEK_MARGIN_S = {"mov,mp4,m4a,3gp,3g2,mj2": 0.0, "matroska,webm": 0.0, "mpegts": 5.0}
"""Containers in which a seek is sound, and how many seconds early it has to aim: MPEG-TS has no index of keyframes."""
COLLECT_EVERY = (
    8  # frames whose side data is looked at: PyAV ties each into a cycle, which keeps it until it is collected
)
REORDERED = 64  # more frames than a decoder holds back
CLOCK_RESTART_S = 0.5  # a timestamp further back than this restarts the clock; one less far back is a late frame
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own drop the transparency of WebM
DECODERS = {"vp9": "libvpx-vp9"}  # FFmpeg's own does not notice damage


class TimedFrame(NamedTuple):
    """A decoded frame, its seconds since the first one, how it is turned, and its pixels' width over their height."""

    time: float
    frame: Any
    orientation: Orientation
    pixel_aspect: float


class PyAvReader:
    """PyAV. It goes on forward to what is near, seeks to what is far, and begins anew where a seek can't be trusted."""

    def __init__(self, path: str, header: Header, seekable: bool = True):
        self.path, self.header, self.seekable = path, header, seekable
        self.stream: Iterator[TimedFrame] | None = None
        self.before: TimedFrame | None = None  # the last frame that was passed, and the one after it
        self.after: TimedFrame | None = None
        self.start_s: float | None = None  # the first frame's timestamp
        self.end = 0.0  # where the video ends, once that was reached
        self.pixel_aspect = header.pixel_aspect  # of the upright frame that `fit` is called with
        self.aspects: dict[int, float] = {}  # pixel aspects by timestamp, of frames that are not shown yet
        self.file: Any = None

    def frames(self, due: np.ndarray, fit: Fit) -> list[np.ndarray]:
        """The fitted frames on screen at `due`; fewer where the video ends before. Raises ClipError `corrupt`."""
        refusal = ClipError("corrupt", "no frame of it decodes")
        if self.end and due[-1] > self.end:  # known to end before: a broken file's later clips need no decoding
            return []
        for seeking in (False, True):
            try:
                if seeking and not self.seek_to(due[0]):
                    break
                if (
                    not seeking
                    and not self.can_continue_to(due[0])
                    and not (due[0] > DECODE_AHEAD_S and self.seek_to(due[0]))
                ):
                    self.rewind()
                return self.collect(due, fit)
            except (av.FFmpegError, ValueError) as error:
                refusal = ClipError("corrupt", decode_failure(self.before and self.before.time, error_text(error)))
                if self.before and self.before.time >= due[0]:  # else the damage lies before the clip: seek beyond it
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

    def collect(self, due: np.ndarray, fit: Fit) -> list[np.ndarray]:
        fitted: list[np.ndarray] = []
        latest: tuple[TimedFrame, np.ndarray] | None = None  # a frame that is due twice is fitted once
        for moment in due:
            while self.after is None or self.after.time <= moment + TIMESTAMP_ERROR_S:
                if not self.advance():
                    break
            shown = self.on_screen(moment)
            if shown and isinstance(shown.frame, DamagedFrame):
                raise ClipError("corrupt", decode_failure(shown.frame.last_good_s, shown.frame.why))
            if shown is None:
                return fitted
            if latest is None or latest[0] is not shown:
                self.pixel_aspect = shown.pixel_aspect ** (-1 if shown.orientation.transposed else 1)
                latest = shown, fit(shown.orientation.upright(self.to_rgb(shown.frame)))
            fitted.append(latest[1])
        return fitted

    def on_screen(self, moment: float) -> TimedFrame | None:
        """The last frame whose time has come, at the earliest the first; None past the video's end."""
        if self.after is None:
            return self.before if moment < self.end else None
        return self.before or self.after

    def advance(self) -> bool:
        """Goes on by a frame; whether there is one."""
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
        """Opens the file, and stands before its first frame."""
        self.close()
        self.file = open_video(self.path)
        self.stream = self.decoded_frames()

    def can_continue_to(self, moment: float) -> bool:
        """Whether a moment lies ahead, and near enough to decode on."""
        if self.after is None or self.stream is None:
            return False
        return (self.before or self.after).time <= moment <= self.after.time + DECODE_AHEAD_S

    def seek_to(self, moment: float) -> bool:
        """Goes to the keyframe before a moment; whether that is where it came to."""
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
        """How long a frame is shown; a damaged last one is not."""
        if isinstance(frame, DamagedFrame):
            return 0.0
        return float(frame.duration * (frame.time_base or 0)) or self.header.frame_s

    def decoded_frames(self, after_seek: bool = False) -> Iterator[TimedFrame]:
        """Frames whose times never fall.

        Late frames are skipped. Where the timestamps jump back, as in joined recordings, time goes on. After a seek it
        begins at a keyframe, since what comes before may refer to pictures that were not decoded, and ends at a frame
        without a timestamp.
        """
        stream = video_stream(self.file)
        tick, last, sound, shift = float(stream.time_base), None, None, 0.0
        # A decoder of our own choice knows nothing of the container's display matrix.
        upright = orientation = self.header.orientation if self.decoder_name(stream) else UPRIGHT
        looks = 0
        for frame in self.checked_frames(stream):
            broken = isinstance(frame, DamagedFrame)
            if after_seek and last is None and (broken or not frame.key_frame):
                continue
            if not broken:
                check_size([(frame.width, frame.height)])
            # AVI knows no presentation times: of a frame it has only when it was handed to the decoder.
            stamp = frame.dts if self.header.container == "avi" else frame.pts
            if stamp is None and after_seek:
                return
            time = None if stamp is None else stamp * tick + shift
            if last is None:
                time = time or 0.0
            elif time is None or time < last - CLOCK_RESTART_S:
                following = last + self.header.frame_s
                shift += 0.0 if time is None else following - time
                time = following
            elif time < last - TIMESTAMP_ERROR_S:
                continue
            else:
                time = max(time, last)
            zero = self.start_s = time if self.start_s is None else self.start_s
            last = time
            sound = sound if broken else time - zero
            if broken:
                yield TimedFrame(
                    time - zero, replace(frame, last_good_s=sound), orientation, self.pixel_aspect_of(frame)
                )
                continue
            # A display orientation in H.264 or HEVC holds until the next keyframe; FFmpeg tells it of its own frame.
            looks_there = self.header.may_rotate or bool(frame.rotation)
            own = orientation_of(frame) if looks_there else None
            orientation = own or (upright if frame.key_frame else orientation)
            looks += looks_there
            if looks_there and looks % COLLECT_EVERY == 0:
                gc.collect()
            yield TimedFrame(time - zero, frame, orientation, self.pixel_aspect_of(frame))

    def checked_frames(self, stream: Any) -> Iterator[Any]:
        """Frames in the order in which they are shown, or DamagedFrame in their place."""
        name = self.decoder_name(stream)
        context: Any = av.CodecContext.create(name, "r") if name else stream.codec_context
        context.thread_count = 1  # the other cores have work of their own

        def note_aspect(packet: Any) -> None:
            if self.header.aspect_in_stream and packet.pts is not None:
                self.aspects[packet.pts] = plausible_pixel_aspect(context.sample_aspect_ratio)

        return checked_frames(self.file, stream, context, note_aspect)

    def decoder_name(self, stream: Any) -> str | None:
        """The name of the decoder that is used in place of FFmpeg's choice, if any."""
        return (ALPHA_DECODERS if self.header.alpha else DECODERS).get(stream.codec_context.name)

    def to_rgb(self, frame: Any) -> np.ndarray:
        """A frame uint8 `H W 3`, transparency on black."""
        if self.header.alpha:
            return on_black(colours.to_rgb(frame, self.header.colours, "rgba"))
        return colours.to_rgb(frame, self.header.colours, "rgb24")

    def pixel_aspect_of(self, frame: Any) -> float:
        """The width over the height of a frame's pixels, which a stream may change as it goes."""
        aspect = self.aspects.pop(frame.pts, self.header.pixel_aspect)
        if len(self.aspects) > REORDERED:  # what was never shown
            self.aspects.clear()
        return aspect

    def close(self) -> None:
        """Lets go of the file and its frames."""
        self.stream = self.before = self.after = None
        self.aspects = {}
        if self.file is not None:
            self.file.close()
            self.file = None


def decode_failure(last_good_s: float | None, why: str) -> str:
    """What to say of damage that follows the last sound frame, if any."""
    return f"decoding fails {'at the first frame' if last_good_s is None else f'at {last_good_s:.2f} s'}: {why}"


def on_black(rgba: np.ndarray) -> np.ndarray:
    """uint8 `H W 4` with straight alpha to `H W 3`."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)
