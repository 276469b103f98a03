"""What a clip is cut and fitted to: frames x height x width at a rate. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.reasons import ClipError
from sora_train.data.config import DataConfig
from sora_train.schema import bucket_name

TRANSFORM_VERSION = 3
"""Part of the encoding hash: raise it when the same video gives other frames."""
TOLERANCE_S = 0.01  # containers round durations to milliseconds
TIMESTAMP_ERROR_S = 1.5e-3  # a frame's time may be off by so much: Matroska, FLV and ASF round to milliseconds


@dataclass(frozen=True)
class Bucket:
    """A clip's shape in frames and pixels, and its frames per second."""

    frames: int
    height: int
    width: int
    fps: float

    @property
    def name(self) -> str:
        return bucket_name(self.frames, self.height, self.width)

    @property
    def seconds(self) -> float:
        """How long a clip lasts, the last frame's own time included."""
        return self.frames / self.fps

    @property
    def clip_bytes(self) -> int:
        """Memory of a clip's frames."""
        return self.frames * self.height * self.width * 3

    def times(self) -> np.ndarray:
        """When each frame is due, in seconds from the clip's start."""
        return np.arange(self.frames) / self.fps

    def is_filled_by(self, seconds: float) -> bool:
        """Whether so much video is enough for a clip."""
        return seconds >= self.seconds - TOLERANCE_S

    def crop_box(
        self, width: int, height: int, pixel_aspect: float = 1.0, place: tuple[float, float] = (0.5, 0.5)
    ) -> tuple[float, float, float, float]:
        """The part of a frame that has the bucket's shape: left, top, right, bottom in the frame's own pixels.

        `pixel_aspect` is a source pixel's width over its height. Resizing this box to the bucket is covering the bucket
        with the frame and cutting off what stands out: `place` says how much of that at the left and at the top, 0.5
        half of it.
        """
        shape = self.width / self.height / pixel_aspect  # wanted width over height, in source pixels
        crop_width, crop_height = min(width, height * shape), min(height, width / shape)
        left, top = (width - crop_width) * place[0], (height - crop_height) * place[1]
        return left, top, left + crop_width, top + crop_height

    def upscale_factor(self, width: float, height: float) -> float:
        """How many times larger a picture is made to cover the bucket; below 1 it shrinks."""
        return max(self.width / width, self.height / height)


def buckets_of(data: DataConfig) -> tuple[Bucket, ...]:
    """Every bucket that a recipe asks for."""
    return tuple(Bucket(frames, height, width, data.fps) for frames, height, width in data.shapes)


def choose_bucket(
    buckets: Sequence[Bucket],
    width: float,
    height: float,
    seconds: float,
    max_enlarge: float = 0.0,
    still: bool = False,
) -> Bucket:
    """The bucket of a clip out of a source that is shown at `width` x `height` and goes on for `seconds`.

    First the most frames that it fills (a picture fills buckets of one frame, a video these only where there are no
    others), then the nearest shape, then the largest that needs no enlarging, else the smallest. `max_enlarge` 0 is no
    bound. Raises ClipError `too_short` or `too_small`.
    """
    if still:
        filled = [bucket for bucket in buckets if bucket.frames == 1]
        if not filled:
            raise ClipError("too_short", "is a still picture, and data.buckets has none of one frame (1xHEIGHTxWIDTH)")
    else:
        moving = [bucket for bucket in buckets if bucket.frames > 1] or list(buckets)
        filled = [bucket for bucket in moving if bucket.is_filled_by(seconds)]
        if not filled:
            least = min(moving, key=lambda bucket: bucket.frames)
            raise ClipError("too_short", f"lasts {seconds:.2f} s; {clip_length(least)}")
        most = max(bucket.frames for bucket in filled)
        filled = [bucket for bucket in filled if bucket.frames == most]
    large_enough = [b for b in filled if not max_enlarge or b.upscale_factor(width, height) <= max_enlarge + 1e-9]
    if not large_enough:
        least = min(filled, key=lambda bucket: bucket.upscale_factor(width, height))
        raise ClipError(
            "too_small",
            f"is {width:.0f}x{height:.0f}; {least.name} would enlarge it "
            f"{least.upscale_factor(width, height):.2f} times, the bound is {max_enlarge:g} (data.max_enlarge)",
        )

    def order(bucket: Bucket) -> tuple:
        stretch = abs(math.log(bucket.width / bucket.height) - math.log(width / height))
        scale, area = bucket.upscale_factor(width, height), bucket.width * bucket.height
        fits = scale <= 1 + 1e-9
        return round(stretch, 6), not fits, -area if fits else area, -bucket.width, bucket.height

    return min(large_enough, key=order)


def clip_length(bucket: Bucket) -> str:
    """How long a clip is, for messages."""
    return f"a clip of {bucket.frames} frames at {bucket.fps:g} fps takes {bucket.seconds:.2f} s"
