"""Buckets: the shapes (frames x height x width) and frame rate of clips, and the choice of a clip's bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.reasons import ClipError
from sora_train.data.config import DataConfig
from sora_train.schema import bucket_name

TRANSFORM_VERSION = 3
"""Part of the encoding hash: increase it if the same video gives other frames."""
TOLERANCE_S = 0.01  # containers round durations to milliseconds
TIMESTAMP_ERROR_S = 1.5e-3  # of a frame's time: Matroska, FLV and ASF round to milliseconds


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
        """Duration of a clip, including that of its last frame."""
        return self.frames / self.fps

    @property
    def clip_bytes(self) -> int:
        """Memory of a clip's frames."""
        return self.frames * self.height * self.width * 3

    def times(self) -> np.ndarray:
        """The time of each frame, in seconds since the clip's start."""
        return np.arange(self.frames) / self.fps

    def is_filled_by(self, seconds: float) -> bool:
        """Whether a video of this duration is long enough for a clip."""
        return seconds >= self.seconds - TOLERANCE_S

    def crop_box(
        self, width: int, height: int, pixel_aspect: float = 1.0, offset: tuple[float, float] = (0.5, 0.5)
    ) -> tuple[float, float, float, float]:
        """The largest part of a frame with the bucket's shape: left, top, right and bottom in the frame's pixels.

        `pixel_aspect` is the width of a source pixel over its height. `offset` is the share of the surplus that is cut
        off at the left and at the top.
        """
        shape = self.width / self.height / pixel_aspect  # wanted width over height, in source pixels
        crop_width, crop_height = min(width, height * shape), min(height, width / shape)
        left, top = (width - crop_width) * offset[0], (height - crop_height) * offset[1]
        return left, top, left + crop_width, top + crop_height

    def upscale_factor(self, width: float, height: float) -> float:
        """The factor that makes an image cover the bucket; below 1 it shrinks."""
        return max(self.width / width, self.height / height)


def buckets_of(data: DataConfig) -> tuple[Bucket, ...]:
    """The buckets of a recipe."""
    return tuple(Bucket(frames, height, width, data.fps) for frames, height, width in data.shapes)


def choose_bucket(
    buckets: Sequence[Bucket],
    width: float,
    height: float,
    seconds: float,
    max_enlarge: float = 0.0,
    still: bool = False,
) -> Bucket:
    """The bucket of a clip from a source with this display size, which lasts `seconds` from the clip's start.

    First the most frames that it fills (an image fills buckets of one frame, a video only if there are no others), then
    the nearest shape, then the largest that needs no upscaling, else the smallest. `max_enlarge` 0 is no bound. Raises
    ClipError `too_short` or `too_small`.
    """
    moving = [bucket for bucket in buckets if bucket.frames > 1] or list(buckets)
    filled = [b for b in buckets if b.frames == 1] if still else [b for b in moving if b.is_filled_by(seconds)]
    if not filled:
        if still:
            raise ClipError("too_short", "has a single frame, and data.buckets no bucket of one (1xHEIGHTxWIDTH)")
        shortest = min(moving, key=lambda bucket: bucket.frames)
        raise ClipError("too_short", f"lasts {seconds:.2f} s; {clip_length(shortest)}")
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
    """A clip's duration, for messages."""
    return f"a clip of {bucket.frames} frames at {bucket.fps:g} fps takes {bucket.seconds:.2f} s"
