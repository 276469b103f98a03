"""The recipe's `data`, `selection` and `prep` sections.

Imports neither torch nor Ray, because decoder processes import it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from sora_train.latent_shape import shape_errors
from sora_train.section import Section

LARGEST = 2**16
"""Largest number of frames, or of pixels on a side, so torch can count their product."""
SHORTEST_STRIDE_S = 0.001


class DataConfig(Section):
    """Sources, clips and shards."""

    captions: str = ""
    """CSV, JSONL or Parquet file with a column of file names and one of captions, or a folder of media with `.txt`
    files."""
    file_column: str = "video_file_name"
    """Column of the file names."""
    caption_column: str = "prompt"
    """Column of the captions. In JSONL and Parquet it may hold a list, from which every epoch draws one."""
    root: str = ""
    """Folder that the file names are relative to. Empty: the folder of the captions file."""
    output: str = "shards"
    """Folder of the Parquet shards, which `sora prep` writes and `sora train` reads."""
    frames: int = Field(default=16, ge=1, le=LARGEST)
    """Frames of a clip."""
    fps: PositiveFloat = 8.0
    """Frames per second, measured by the timestamps of the source."""
    height: int = Field(default=256, ge=1, le=LARGEST)
    """Height of a clip in pixels, after resizing and cropping."""
    width: int = Field(default=256, ge=1, le=LARGEST)
    """Width of a clip in pixels, after resizing and cropping."""
    buckets: tuple[str, ...] = ()
    """Shapes FRAMESxHEIGHTxWIDTH that replace the one above. A clip goes to the nearest shape that it fills. Images go
    to shapes of one frame."""
    max_enlarge: NonNegativeFloat = 0.0
    """Largest factor by which a clip may be enlarged to fill its bucket; 0 is no limit. Beyond it the clip is
    `too_small`."""
    crop: Literal["centre", "random"] = "centre"
    """Part of a frame to keep if its shape is not the bucket's. `random` is fixed per clip."""
    flip: bool = False
    """Mirror half of the clips at random. Leave it off if captions say `left` or frames show writing."""
    start_s: NonNegativeFloat = 0.0
    """Start of a video's first clip, in seconds."""
    stride_s: NonNegativeFloat = 0.0
    """Seconds between the starts of consecutive clips of a video; 0 takes one clip per video."""
    clips_per_video: NonNegativeInt = 0
    """Most clips per video; 0 is no limit."""
    holdout_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the sources in the held-out split, which training never sees. A hash of the source chooses them."""
    image_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps that take images (buckets of one frame), which then have their own epochs. 0 excludes images.
    If unset, all buckets take turns in proportion to their clips."""
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)
    """Largest share of sources that can't be read, decoded or encoded. Checked after 200 sources and at the end."""
    timeout_s: PositiveFloat = 120.0
    """Seconds that decoding one clip may take. A clip that takes longer is skipped as `timeout`."""

    @field_validator("buckets")
    @classmethod
    def are_shapes(cls, buckets: tuple[str, ...]) -> tuple[str, ...]:
        """Checks that each is FRAMESxHEIGHTxWIDTH and that none is listed twice."""
        for name in buckets:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", name):
                raise ValueError(
                    f"data.buckets: {name!r} is not a shape; write FRAMESxHEIGHTxWIDTH, such as 16x256x448"
                )
            if max(map(int, name.split("x"))) > LARGEST:
                raise ValueError(f"data.buckets: {name} is too large; {LARGEST} is the most of each")
            if buckets.count(name) > 1:
                raise ValueError(f"data.buckets: {name} is listed twice")
        return buckets

    @field_validator("stride_s")
    @classmethod
    def is_no_stride_or_a_time(cls, stride_s: float) -> float:
        """Refuses strides so short that clips start at the same time, in numbers without end."""
        if 0 < stride_s < SHORTEST_STRIDE_S:
            raise ValueError(f"data.stride_s is {stride_s:g}; it must be at least {SHORTEST_STRIDE_S:g}, or 0")
        return stride_s

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Frames, height and width of every bucket in the recipe."""
        if not self.buckets:
            return ((self.frames, self.height, self.width),)
        return tuple((int(f), int(h), int(w)) for f, h, w in (name.split("x") for name in self.buckets))


def image_ratio_error(image_ratio: float | None, shapes: Iterable[tuple[int, int, int]]) -> str:
    """An error message if data.image_ratio needs buckets that are missing.

    A shape is (frames, height, width). The message is empty if none is missing.
    """
    shapes = list(shapes)
    videos, images = any(shape[0] > 1 for shape in shapes), any(shape[0] == 1 for shape in shapes)
    if image_ratio is None or (videos and (images or not image_ratio)):
        return ""
    wanted = "of videos and of images (one frame)" if image_ratio else "of videos"
    names = ", ".join(f"{frames}x{height}x{width}" for frames, height, width in shapes)
    return f"data.image_ratio {image_ratio:g} needs buckets {wanted}; there is only {names}. Add some, or remove it"


def undividable_shapes(data: DataConfig, factor: int, time_factor: int, patch: int) -> list[str]:
    """An error message for each number of the clips' shapes that gives no whole latents and patches."""
    wrong: list[str] = []
    for shape in data.shapes:
        key = f"data.buckets: {'x'.join(map(str, shape))}: " if data.buckets else "data."
        wrong += [key + sentence for sentence in shape_errors(shape, factor, time_factor, patch)]
    return wrong


class SelectionConfig(Section):
    """Filters for clips, all off by default. Each counts skipped clips by a reason."""

    min_seconds: NonNegativeFloat = 0.0
    """Shortest source, in seconds. Shorter ones are skipped as `too_short`."""
    max_seconds: NonNegativeFloat = 0.0
    """Longest source, in seconds; 0 is no limit. Longer ones are skipped as `too_long`."""
    min_side: NonNegativeInt = 0
    """Smallest width or height of a source, in pixels. Smaller ones are skipped as `too_small`."""
    black: bool = False
    """Skip clips that are entirely black, as `black`."""
    frozen: bool = False
    """Skip clips in which nothing changes, as `frozen`."""
    min_motion: NonNegativeFloat = 0.0
    """Least motion: mean optical flow in percent of the frame width per second. Clips below it are skipped as
    `too_still`."""
    max_motion: NonNegativeFloat = 0.0
    """Most motion, in the same unit; 0 is no limit. Clips above it are skipped as `too_lively`."""
    min_sharpness: NonNegativeFloat = 0.0
    """Least sharpness: variance of the Laplacian of grey frames (0 to 255) at the bucket's size. Clips below it are
    skipped as `blurred`."""
    scene_cuts: bool = False
    """Detect cuts (PySceneDetect), so no clip crosses one. Scenes too short for a clip are skipped as `crosses_cut`."""
    scene_threshold: PositiveFloat = 27.0
    """Least PySceneDetect content value, 0 to 255, that is a cut between two frames."""
    duplicates: bool = False
    """Skip a clip, as `duplicate`, if an earlier file with the same bytes has a clip at the same time."""
    near_duplicates: int | None = Field(default=None, ge=0, le=64)
    """Skip clips that look like an earlier one, as `near_duplicate`. The value is the largest number of bits by
    which the 64-bit perceptual hashes of two frames may differ: 4 is strict, 10 is loose."""


class PrepConfig(Section):
    """Resources of `sora prep`; 0 chooses by the size of the cluster."""

    decode_workers: NonNegativeInt = 0
    """Number of decoding actors. Each has its own process."""
    vae_workers: NonNegativeInt = 0
    """Number of VAE actors."""
    vae_gpus: NonNegativeFloat = 0.0
    """GPUs per VAE actor, if the cluster has any."""
    vae_batch: NonNegativeInt = 0
    """Clips that the VAE encodes in one batch."""
    text_workers: NonNegativeInt = 0
    """Number of text encoder actors. Each embeds a caption only once, so with one actor no caption is embedded
    twice."""
    text_gpus: NonNegativeFloat = 0.0
    """GPUs per text encoder actor, if the cluster has any."""
    text_batch: PositiveInt = 32
    """Captions that the text encoder embeds in one batch."""
    shard_mb: PositiveInt = 256
    """Size of a shard in MB. Slow preparation writes smaller ones, at least every 30 s."""
