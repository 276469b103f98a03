"""The recipe's `data`, `selection` and `prep` sections. Imports neither torch nor Ray, as decoder processes read it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from sora_train.section import Section

LARGEST = 2**16
"""Most frames, and pixels on a side, so that torch can count their product."""


class DataConfig(Section):
    """Sources, clips and shards."""

    captions: str = ""
    """CSV, JSONL or Parquet with a column of file names and one of captions; or a folder of media with `.txt` files."""
    file_column: str = "video_file_name"
    """Column of the file names."""
    caption_column: str = "prompt"
    """Column of the captions; in JSONL and Parquet it may hold a list, of which every epoch draws one."""
    root: str = ""
    """Folder that the file names are relative to; empty: the folder of the captions file."""
    output: str = "shards"
    """Folder of the Parquet shards: `sora prep` writes it, `sora train` reads it."""
    frames: int = Field(default=16, ge=1, le=LARGEST)
    """Frames of a clip."""
    fps: PositiveFloat = 8.0
    """Frames per second, by the timestamps of the source."""
    height: int = Field(default=256, ge=1, le=LARGEST)
    """Height of a clip in pixels, after resizing and cropping."""
    width: int = Field(default=256, ge=1, le=LARGEST)
    """Width of a clip in pixels, after resizing and cropping."""
    buckets: tuple[str, ...] = ()
    """Shapes FRAMESxHEIGHTxWIDTH instead of the one above; a clip goes to the nearest that it fills; images to 1x…"""
    max_enlarge: NonNegativeFloat = 0.0
    """How many times larger a clip may be made to fill its bucket, else it is `too_small`; 0 is no bound."""
    crop: Literal["centre", "random"] = "centre"
    """Which part of a frame is kept if its shape is not the bucket's; random is fixed per clip."""
    flip: bool = False
    """Mirror half of the clips at random; wrong if captions say `left` or frames show writing."""
    start_s: NonNegativeFloat = 0.0
    """Where in a video its first clip begins, in seconds."""
    stride_s: NonNegativeFloat = 0.0
    """Seconds between the starts of consecutive clips of a video; 0 takes one clip per video."""
    clips_per_video: NonNegativeInt = 0
    """Most clips per video; 0 is no bound."""
    holdout_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the sources that training never sees (the held-out split), by a hash of the source."""
    image_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps that take images (buckets of one frame), with epochs of their own; 0 leaves images out,
    unset lets all buckets take turns by their clips."""
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)
    """Largest share of sources that can't be read, decoded or encoded; judged after 200 sources and at the end."""
    timeout_s: PositiveFloat = 120.0
    """Seconds that decoding one clip may take before it is given up as `timeout`."""

    @field_validator("buckets")
    @classmethod
    def are_shapes(cls, buckets: tuple[str, ...]) -> tuple[str, ...]:
        """Each `FRAMESxHEIGHTxWIDTH`, none twice."""
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

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Frames, height and width of every bucket that is asked for."""
        if not self.buckets:
            return ((self.frames, self.height, self.width),)
        return tuple((int(f), int(h), int(w)) for f, h, w in (name.split("x") for name in self.buckets))


def image_ratio_error(image_ratio: float | None, shapes: Iterable[tuple[int, int, int]]) -> str:
    """Which buckets data.image_ratio needs and these (frames, height, width) lack; empty if none."""
    shapes = list(shapes)
    videos, images = any(shape[0] > 1 for shape in shapes), any(shape[0] == 1 for shape in shapes)
    if image_ratio is None or (videos and (images or not image_ratio)):
        return ""
    wanted = "of videos and of images (one frame)" if image_ratio else "of videos"
    names = ", ".join(f"{frames}x{height}x{width}" for frames, height, width in shapes)
    return f"data.image_ratio {image_ratio:g} needs buckets {wanted}; there is only {names}. Add some, or remove it"


def small_bucket_warnings(clips: Mapping[str, int], batch_size: int) -> list[str]:
    """A warning for every bucket that has fewer training clips than a batch."""
    return [
        f"the bucket {name} has {count} training clip{'s' * (count > 1)}, fewer than train.batch_size {batch_size}: "
        "its steps average over fewer clips, so each of these weighs more than a clip of another bucket. Add clips of "
        "this shape, remove it from data.buckets, or lower train.batch_size"
        for name, count in clips.items()
        if 0 < count < batch_size
    ]


class SelectionConfig(Section):
    """Filters for clips. All are off by default; each filter has a reason under which its clips are counted."""

    min_seconds: NonNegativeFloat = 0.0
    """Shortest source; shorter ones are `too_short`."""
    max_seconds: NonNegativeFloat = 0.0
    """Longest source, longer ones are `too_long`; 0 is no bound."""
    min_side: NonNegativeInt = 0
    """Smallest width or height of a source in pixels; below it is `too_small`."""
    black: bool = False
    """Drop clips that are entirely black, as `black`."""
    frozen: bool = False
    """Drop clips in which nothing changes, as `frozen`."""
    min_motion: NonNegativeFloat = 0.0
    """Least motion, else `too_still`: mean optical flow in percent of the frame width per second."""
    max_motion: NonNegativeFloat = 0.0
    """Most motion, else `too_lively`, in the same unit; 0 is no bound."""
    min_sharpness: NonNegativeFloat = 0.0
    """Least sharpness, else `blurred`: variance of the Laplacian of grey frames, 0 to 255, at the bucket's size."""
    scene_cuts: bool = False
    """Detect cuts (PySceneDetect), so no clip crosses one; scenes too short for a clip are `crosses_cut`."""
    scene_threshold: PositiveFloat = 27.0
    """How much a frame must differ from the one before to be a cut: PySceneDetect's content value, 0 to 255."""
    duplicates: bool = False
    """Drop clips at the same time in a file with the same bytes as an earlier file, as `duplicate`."""
    near_duplicates: int | None = Field(default=None, ge=0, le=64)
    """Drop clips that look like an earlier one, as `near_duplicate`: most bits of 64 of a frame's perceptual hash that
    may differ; 4 is strict, 10 is loose."""


class PrepConfig(Section):
    """Resources that `sora prep` uses; 0 chooses by the size of the cluster."""

    decode_workers: NonNegativeInt = 0
    """Decoding actors, each with a process of its own."""
    vae_workers: NonNegativeInt = 0
    """VAE actors."""
    vae_gpus: NonNegativeFloat = 0.0
    """GPUs per such actor, if the cluster has any."""
    vae_batch: NonNegativeInt = 0
    """Clips that the VAE encodes at a time."""
    text_workers: NonNegativeInt = 0
    """Text encoder actors. Each embeds a caption once, so one actor embeds every distinct caption once."""
    text_gpus: NonNegativeFloat = 0.0
    """GPUs per such actor, if the cluster has any."""
    text_batch: PositiveInt = 32
    """Captions that the text encoder embeds at a time."""
