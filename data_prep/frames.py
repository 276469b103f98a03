"""PyAV reader: the frames of a video that are nearest to the times they are due, each fitted as soon as it is decoded.

Time zero is the first frame's timestamp. The reader seeks, checks where it arrived, and holds two raw frames, however
long the video is. decord was dropped: it hides decoding errors, opens playlists, returns wrong frames where groups of
pictures are open, and is no faster (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import av
import numpy as np

from data_prep.buckets import TIE_S
from data_prep.damage import Damaged, pictures
from data_prep.headers import Header, check_size, opened, plain, video_of
from data_prep.reasons import ClipError

Fit = Callable[[np.ndarray], np.ndarray]
"""A raw frame uint8 `H W 3`, turned upright, to one of the clip's size."""
NEAR_S = 10.0  # decoding on is about as quick as a seek that lands at the keyframe before
SEEKS = {"mov,mp4,m4a,3gp,3g2,mj2": 0.0, "matroska,webm": 0.0, "mpegts": 5.0}
"""Containers in which a seek is sound, and how many seconds early it has to aim: MPEG-TS has no index of keyframes."""
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own drop the transparency of WebM
DECODERS = {"vp9": "libvpx-vp9"}  # FFmpeg's own does not notice damage


class Anywhere:
    """PyAV. It goes on forward to what is near, seeks to what is far, and begins anew where a seek can't be trusted."""

    def __init__(self, path: str, header: Header):
        self.path, self.header = path, header
        self.stream: Iterator[tuple[float, Any]] | None = None
        self.before: tuple[float, Any] | None = None  # the last frame that was passed, and the one after it
        self.after: tuple[float, Any] | None = None
        self.zero: float | None = None  # the first frame's timestamp
        self.end = 0.0  # where the video ends, once that was reached
        self.file: Any = None

    def frames(self, due: np.ndarray, fit: Fit) -> list[np.ndarray]:
        """The fitted frames nearest to `due`; fewer where the video ends before. Raises ClipError `corrupt`."""
        refusal = ClipError("corrupt", "no frame of it decodes")
        if self.end and due[-1] > self.end:  # known to end before: a broken file's later clips need no decoding
            return []
        for seeking in (False, True):
            try:
                if seeking and not self.seeks(due[0]):
                    break
                if not seeking and not self.holds(due[0]) and not (due[0] > NEAR_S and self.seeks(due[0])):
                    self.begins()
                return self.collect(due, fit)
            except (av.FFmpegError, ValueError) as error:
                refusal = ClipError("corrupt", failure(self.before and self.before[0], plain(error)))
                if self.before and self.before[0] >= due[0]:  # else the damage lies before the clip: seek beyond it
                    break
        self.close()
        raise refusal

    def collect(self, due: np.ndarray, fit: Fit) -> list[np.ndarray]:
        fitted: list[np.ndarray] = []
        latest: tuple[Any, np.ndarray] | None = None  # a frame that is due twice is fitted once
        for moment in due:
            while self.after is None or self.after[0] < moment:
                if not self.step():
                    break
            frame = self.nearest(moment)
            if isinstance(frame, Damaged):
                if not self.goes_on(frame):  # it is cut off in its last picture
                    return fitted
                raise ClipError("corrupt", failure(frame.sound_s, frame.why))
            if frame is None:
                return fitted
            if latest is None or latest[0] is not frame:
                latest = frame, fit(self.pixels(frame))
            fitted.append(latest[1])
        return fitted

    def goes_on(self, damaged: Damaged) -> bool:
        """Whether the stream goes on behind a damaged picture, which may be the one ahead."""
        ahead = self.after is not None and self.after[1] is not damaged
        return ahead or self.step()

    def nearest(self, moment: float) -> Any:
        """Of the two frames around a moment the nearer one, the earlier of equals; none past the video's end."""
        if self.after is None:
            return self.before[1] if self.before and moment < self.end else None
        if self.before and moment - self.before[0] <= self.after[0] - moment + TIE_S:
            return self.before[1]
        return self.after[1]

    def step(self) -> bool:
        """Goes on by a frame; whether there is one."""
        if self.stream is None:
            return False
        if self.after is not None:
            self.before = self.after
        self.after = next(self.stream, None)
        if self.after is None:
            self.stream = None
            self.end = self.before[0] + self.shown_s(self.before[1]) if self.before else 0.0
        return self.after is not None

    def begins(self) -> None:
        """Opens the file, and stands before its first frame."""
        self.close()
        self.file = opened(self.path)
        self.stream = self.decoded()

    def holds(self, moment: float) -> bool:
        """Whether a moment lies ahead, and near enough to decode on."""
        if self.after is None or self.stream is None:
            return False
        return (self.before or self.after)[0] <= moment <= self.after[0] + NEAR_S

    def seeks(self, moment: float) -> bool:
        """Goes to the keyframe before a moment; whether that is where it came to."""
        early = SEEKS.get(self.header.container)
        if early is None:
            return False
        if self.zero is None:
            self.begins()
            self.step()
        self.begins()
        try:
            stream = video_of(self.file)
            aim = (self.zero or 0.0) + moment - early
            self.file.seek(int(aim / stream.time_base), stream=stream, backward=True)
            self.stream = self.decoded(after_seek=True)
            return self.step() and self.after is not None and self.after[0] <= moment
        except (av.FFmpegError, ValueError):
            return False

    def shown_s(self, frame: Any) -> float:
        """How long a frame is shown; a damaged last one is not."""
        if isinstance(frame, Damaged):
            return 0.0
        tick = frame.time_base or 0
        return float(frame.duration * tick) or self.header.frame_s

    def decoded(self, after_seek: bool = False) -> Iterator[tuple[float, Any]]:
        """Frames with their seconds since the first one. After a seek it begins at a keyframe, since what comes before
        may refer to pictures that were not decoded, and ends at a frame without a timestamp."""
        stream = video_of(self.file)
        tick, last, sound = float(stream.time_base), None, None
        for frame in self.pictures(stream):
            broken = isinstance(frame, Damaged)
            if after_seek and last is None and (broken or not frame.key_frame):
                continue
            if not broken:
                check_size([(frame.width, frame.height)])
            # AVI knows no presentation times: of a frame it has only when it was handed to the decoder.
            stamp = frame.dts if self.header.container == "avi" else frame.pts
            if stamp is None and after_seek:
                return
            time = None if stamp is None else stamp * tick
            if time is None or (last is not None and time <= last):
                time = 0.0 if last is None else last + self.header.frame_s
            zero = self.zero = time if self.zero is None else self.zero
            last = time
            sound = sound if broken else time - zero
            yield time - zero, replace(frame, sound_s=sound) if broken else frame

    def pictures(self, stream: Any) -> Iterator[Any]:
        """Frames in the order in which they are shown, or Damaged in their place."""
        codec = stream.codec_context.name
        name = (ALPHA_DECODERS if self.header.alpha else DECODERS).get(codec)
        context: Any = av.CodecContext.create(name, "r") if name else stream.codec_context
        context.thread_count = 1  # the other cores have work of their own
        return pictures(self.file, stream, context)

    def pixels(self, frame: Any) -> np.ndarray:
        """A frame uint8 `H W 3`, transparency on black, turned by its rotation tag."""
        alpha = self.header.alpha
        image = on_black(frame.to_ndarray(format="rgba")) if alpha else frame.to_ndarray(format="rgb24")
        return np.rot90(image, round(frame.rotation / 90) % 4)

    def close(self) -> None:
        """Lets go of the file and its frames."""
        self.stream = self.before = self.after = None
        if self.file is not None:
            self.file.close()
            self.file = None


def failure(sound_s: float | None, why: str) -> str:
    """What to say of damage that follows the last sound frame, if any."""
    return f"decoding fails {'at the first frame' if sound_s is None else f'at {sound_s:.2f} s'}: {why}"


def on_black(rgba: np.ndarray) -> np.ndarray:
    """uint8 `H W 4` with straight alpha to `H W 3`."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)
