"""What a clip is cut and fitted to: frames x height x width at a rate. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sora_train.schema import bucket_name

TRANSFORM_VERSION = 1
"""Part of the encoding hash: raise it when the same video gives other frames."""
TOLERANCE_S = 0.01  # containers round durations to milliseconds


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

    def crop_box(self, width: int, height: int, pixel_aspect: float = 1.0) -> tuple[float, float, float, float]:
        """The centred part of a frame that has the bucket's shape: left, top, right, bottom in the frame's own pixels.

        `pixel_aspect` is a source pixel's width over its height. Resizing this box to the bucket is covering the bucket
        with the frame and cutting off what stands out.
        """
        shape = self.width / self.height / pixel_aspect  # wanted width over height, in source pixels
        crop_width, crop_height = min(width, height * shape), min(height, width / shape)
        left, top = (width - crop_width) / 2, (height - crop_height) / 2
        return left, top, left + crop_width, top + crop_height


def nearest_frames(starts: np.ndarray, due: np.ndarray) -> np.ndarray:
    """Index of the frame whose timestamp is nearest to each due time (the earlier one of two); `starts` rises."""
    after = np.searchsorted(starts, due).clip(1, len(starts) - 1) if len(starts) > 1 else np.zeros(len(due), int)
    before = np.maximum(after - 1, 0)
    return np.where(due - starts[before] <= starts[after] - due + 1e-6, before, after)  # float32 times, ms in Matroska
