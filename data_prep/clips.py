"""One clip of one local file: open, pick frames by their timestamps, turn, crop, resize. No Ray, no torch.

decord (its maintained fork, decord2) goes first, because it seeks and turns frames by itself; what it can't read PyAV
reads from the beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import decord
import numpy as np
from PIL import Image

from data_prep.buckets import Bucket, nearest_frames
from data_prep.headers import Header, plain, read_header
from data_prep.reasons import ClipError

decord.logging.set_level(decord.logging.QUIET)  # what FFmpeg says of a bad file comes back as the error's own text
CUT_SHARE, CUT_S = 0.1, 0.5  # less missing at the end than this is how containers round


@dataclass(frozen=True)
class Clip:
    """Frames uint8 `F H W 3`, the file's sha256, and a remark on the file, or none."""

    frames: np.ndarray
    content_hash: str
    remark: str


def read_clip(path: str, bucket: Bucket) -> Clip:
    """The clip at the start of a local file. Raises ClipError with the reason why there is none."""
    header = read_header(path)
    try:
        frames, end = frames_by_decord(path, header, bucket)
    except (decord.DECORDError, RuntimeError, IndexError, ValueError, MemoryError) as first:
        frames, end = frames_by_av(path, header, bucket, f"decord: {first_line(first)}")
    missing = header.promised_s - end if end else 0.0
    remark = ""
    if missing > max(CUT_S, CUT_SHARE * header.promised_s):
        remark = f"breaks off at {end:.1f} s of {header.promised_s:.1f} s; its clip lies before the break"
    return Clip(frames, file_hash(path), remark)


def frames_by_decord(path: str, header: Header, bucket: Bucket) -> tuple[np.ndarray, float]:
    """The bucket's frames and where the video ends; raises ClipError, and whatever decord raises."""
    if header.container in ("mpegts", "mpeg"):  # decord 3.4.0 loses their first group of pictures and says nothing
        raise ValueError(f"{header.container} is left to PyAV")
    reader = decord.VideoReader(path, num_threads=1)
    if not len(reader):
        raise ValueError("no frames")
    spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)  # [frames, 2]: start and end of each
    starts, end = spans[:, 0] - spans[0, 0], float(spans[-1, 1] - spans[0, 0])
    if (np.diff(starts) <= 0).any():  # VP8's hidden frames are counted as frames: its times belong to other pictures
        raise ValueError("frames that share a timestamp")
    check_length(end, header, bucket)
    indices = nearest_frames(starts, bucket.times())
    wanted, position = np.unique(indices, return_inverse=True)
    frames = reader.get_batch(wanted.tolist()).asnumpy()
    aspect = header.pixel_aspect
    if header.width != header.height and frames.shape[1:3] == (header.width, header.height):
        aspect = 1 / aspect  # turned on its side
    return np.stack([fit(frame, bucket, aspect) for frame in frames])[position], end


def frames_by_av(path: str, header: Header, bucket: Bucket, before: str) -> tuple[np.ndarray, float]:
    """The same through PyAV, which decodes from the beginning; the end is 0 where it was not reached.

    `before` is what the first decoder said, for the message.
    """
    due, chosen = bucket.times(), []
    last: tuple[float, np.ndarray] | None = None
    try:
        for time, frame in decoded(path):
            while len(chosen) < len(due) and time >= due[len(chosen)]:
                moment = due[len(chosen)]
                nearer_before = last is not None and moment - last[0] <= time - moment + 1e-6
                chosen.append(last[1] if nearer_before and last is not None else fit_av(frame, bucket, header))
            if len(chosen) == len(due):
                return np.stack(chosen), 0.0
            last = time, fit_av(frame, bucket, header)
    except (av.FFmpegError, ValueError) as error:
        at = f"at {last[0]:.2f} s" if last else "at the first frame"
        raise ClipError("corrupt", f"decoding fails {at}: {plain(error)} ({before})") from None
    if last is None:
        raise ClipError("corrupt", f"no frame of it decodes ({before})")
    end = last[0] + header.frame_s
    check_length(end, header, bucket)
    return np.stack(chosen + [last[1]] * (len(due) - len(chosen))), end


def check_length(end: float, header: Header, bucket: Bucket) -> None:
    """Raises ClipError `truncated` or `too_short` where a video that ends so early doesn't fill a clip."""
    if bucket.is_filled_by(end):
        return
    wanted = f"a clip of {bucket.frames} frames at {bucket.fps:g} fps takes {bucket.seconds:.2f} s"
    if bucket.is_filled_by(header.promised_s) and header.promised_s - end > 2 * header.frame_s:
        raise ClipError("truncated", f"{end:.2f} s of the {header.promised_s:.2f} s that it promises decode; {wanted}")
    raise ClipError("too_short", f"lasts {end:.2f} s; {wanted}")


def decoded(path: str) -> Iterator[tuple[float, Any]]:
    """Frames of the first video stream, with their seconds since the first one."""
    with av.open(path) as file:
        stream = file.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        first = None
        for count, frame in enumerate(file.decode(stream)):
            time = count / rate if frame.time is None else frame.time
            first = time if first is None else first
            yield time - first, frame


def fit_av(frame: Any, bucket: Bucket, header: Header) -> np.ndarray:
    """A frame of PyAV's, turned by its rotation tag, which decord does by itself."""
    turns = round(frame.rotation / 90) % 4
    aspect = 1 / header.pixel_aspect if turns % 2 else header.pixel_aspect
    return fit(np.rot90(frame.to_ndarray(format="rgb24"), turns), bucket, aspect)


def fit(frame: np.ndarray, bucket: Bucket, pixel_aspect: float) -> np.ndarray:
    """The centre of a frame uint8 `H W 3`, resized to the bucket; antialiased where it shrinks."""
    height, width = frame.shape[:2]
    box = bucket.crop_box(width, height, pixel_aspect)
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box=box))


def file_hash(path: str) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """What a decoder's error says, without its stack trace and source position."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rpartition("] ")[2][:200] if lines else type(error).__name__
