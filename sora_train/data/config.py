"""What is prepared, and how: clips and captions, which of them are kept, and what the work takes of the cluster.

Imports neither torch nor Ray: the processes that decode read these too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from sora_train.section import Section

LARGEST = 2**16
"""Of frames, and of pixels on a side: so few that their product still has a name in torch."""


class DataConfig(Section):
    """Clips and captions, and the shards they become."""

    captions: str = ""
    """CSV, JSONL or Parquet with a column of file names and one of captions; or a folder of media with `.txt` files."""
    file_column: str = "video_file_name"
    """Column of the file names."""
    caption_column: str = "prompt"
    """Column of the captions; in JSONL and Parquet it may hold a list, of which every epoch draws one."""
    root: str = ""
    """Folder that the file names are relative to; empty is the folder that the captions lie in."""
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
    """Shapes FRAMESxHEIGHTxWIDTH instead of the one above; a clip goes to the nearest that it fills; pictures to 1x…"""
    max_enlarge: NonNegativeFloat = 0.0
    """How many times larger a clip may be made to fill its bucket, else it is `too_small`; 0 is no bound."""
    crop: Literal["centre", "random"] = "centre"
    """Which part of a picture is kept where its shape is not the bucket's; random is fixed per clip."""
    flip: bool = False
    """Mirror every other clip, drawn per clip; wrong where captions say `left` or show writing."""
    start_s: NonNegativeFloat = 0.0
    """Where in a video its first clip begins, in seconds."""
    stride_s: NonNegativeFloat = 0.0
    """Seconds from the beginning of one clip of a video to that of the next; 0 takes one clip of each."""
    clips_per_video: NonNegativeInt = 0
    """Most clips that a video gives; 0 is no bound."""
    holdout_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the sources that training never sees, by a hash of the source."""
    image_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps that take pictures (buckets of one frame), with epochs of their own; 0 leaves pictures out,
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
                raise ValueError(f"data.buckets: {name!r} is no shape; write FRAMESxHEIGHTxWIDTH, such as 16x256x448")
            if max(map(int, name.split("x"))) > LARGEST:
                raise ValueError(f"data.buckets: {name} is too large; {LARGEST} is the most of each")
            if buckets.count(name) > 1:
                raise ValueError(f"data.buckets: {name} stands twice")
        return buckets

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Frames, height and width of every bucket that is asked for."""
        if not self.buckets:
            return ((self.frames, self.height, self.width),)
        return tuple((int(f), int(h), int(w)) for f, h, w in (name.split("x") for name in self.buckets))


def misfit(image_ratio: float | None, shapes: Iterable[tuple[int, int, int]]) -> str:
    """What data.image_ratio lacks among buckets of these frames, heights and widths; empty where it fits."""
    shapes = list(shapes)
    videos, pictures = any(shape[0] > 1 for shape in shapes), any(shape[0] == 1 for shape in shapes)
    if image_ratio is None or (videos and (pictures or not image_ratio)):
        return ""
    wanted = "of videos and of pictures (one frame)" if image_ratio else "of videos"
    names = ", ".join(f"{frames}x{height}x{width}" for frames, height, width in shapes)
    return f"data.image_ratio {image_ratio:g} needs buckets {wanted}; there is only {names}: add some, or leave it out"


def small_buckets(clips: Mapping[str, int], batch_size: int) -> list[str]:
    """A warning for every bucket that has fewer clips to train on than a batch takes."""
    return [
        f"the bucket {name} has {count} training clip{'s' * (count > 1)}, fewer than train.batch_size {batch_size}: "
        "its steps average over fewer clips, so each of these weighs more than a clip of another bucket. Add clips of "
        "this shape, remove it from data.buckets, or lower train.batch_size"
        for name, count in clips.items()
        if 0 < count < batch_size
    ]


class SelectionConfig(Section):
    """Which clips are kept. All is off by default; what is left out is counted under its own reason."""

    min_seconds: NonNegativeFloat = 0.0
    """Shortest source; shorter ones are `too_short`."""
    max_seconds: NonNegativeFloat = 0.0
    """Longest source, longer ones are `too_long`; 0 is no bound."""
    min_side: NonNegativeInt = 0
    """Smallest width or height of a source in pixels; below it is `too_small`."""
    black: bool = False
    """Leave out clips that are black from end to end, as `black`."""
    frozen: bool = False
    """Leave out clips in which nothing changes, as `frozen`."""
    min_motion: NonNegativeFloat = 0.0
    """Least motion, as `too_still`: mean optical flow in percent of the picture's width per second."""
    max_motion: NonNegativeFloat = 0.0
    """Most motion, as `too_lively`, in the same unit; 0 is no bound."""
    min_sharpness: NonNegativeFloat = 0.0
    """Least sharpness, as `blurred`: variance of the Laplacian of grey frames, 0 to 255, at the bucket's size."""
    scene_cuts: bool = False
    """Find cuts (PySceneDetect), so that no clip crosses one; scenes too short for a clip are `crosses_cut`."""
    scene_threshold: PositiveFloat = 27.0
    """How much a frame must differ from the one before to be a cut: PySceneDetect's content value, 0 to 255."""
    duplicates: bool = False
    """Leave out clips whose file has the same bytes as an earlier one's, at the same place, as `duplicate`."""
    near_duplicates: int | None = Field(default=None, ge=0, le=64)
    """Leave out clips that look like an earlier one, as `near_duplicate`: most bits of 64 of a frame's perceptual
    hash that may differ; 4 is strict, 10 is loose."""


class PrepConfig(Section):
    """What `sora prep` takes of the cluster; 0 is chosen by its size."""

    decode_workers: NonNegativeInt = 0
    """Actors that decode, each with a process of its own."""
    vae_workers: NonNegativeInt = 0
    """Actors that hold the VAE."""
    vae_gpus: NonNegativeFloat = 0.0
    """GPUs that each of them takes, where the cluster has any."""
    vae_batch: NonNegativeInt = 0
    """Clips that the VAE gets at once."""
    text_workers: NonNegativeInt = 0
    """Actors that hold the text encoder. Each embeds a caption once: one actor embeds every distinct caption once."""
    text_gpus: NonNegativeFloat = 0.0
    """GPUs that each of them takes, where the cluster has any."""
    text_batch: PositiveInt = 32
    """Captions that the text encoder gets at once."""
