"""`manifest.json` next to the shards: how they were encoded. No torch."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from sora_train.errors import UserError
from sora_train.latent_shape import latent_shape
from sora_train.section import Section
from sora_train.storage import atomic_write, read_bytes, resolve

SCHEMA_VERSION = 2


def commonest_shape(buckets: dict[str, int]) -> tuple[int, int, int] | None:
    """Frames, height and width of the bucket with the most clips, or None.

    Buckets of videos come before those of images; among equal ones the largest is taken. None if all are empty.
    """
    shapes = [(*map(int, name.split("x")), rows) for name, rows in buckets.items() if rows]
    if not shapes:
        return None
    f, h, w, _ = max(shapes, key=lambda shape: (shape[0] > 1, shape[3], math.prod(shape[:3])))
    return f, h, w


class VaeFacts(Section):
    """The VAE that made the latents.

    `mean` and `std` per channel normalise the latents for the model.
    """

    name: str
    hash: str
    channels: int
    factor: int
    """Spatial compression: pixels per latent on a side."""
    time_factor: int = 1
    """Temporal compression: frames per latent. The first frame has its own latent, so clips have `k time_factor + 1`
    frames."""
    precision: str = "fp32"
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent shape `f c h w` of a clip of `frames` x `height` x `width` pixels."""
        return latent_shape(self.channels, self.factor, self.time_factor, frames, height, width)


class TextFacts(Section):
    """The text encoder that made the embeddings."""

    name: str
    hash: str
    width: int
    max_tokens: int
    precision: str = "fp32"
    caption_cleaning: str = "none"
    """`codec.caption_cleaning` of the embedded captions."""


class LatentFormat(Section):
    """Layout of latents in a row: `[moments, frames, channels, h, w]`."""

    dtype: str = "float16"
    moments: int
    """2: mean and log-variance of the posterior; 1: the VAE has no posterior."""


class Counts(Section):
    """Numbers of clips: `asked` = `written` + `quarantined` + `filtered`.

    A source that can't be opened counts as one clip.
    """

    asked: int
    written: int
    quarantined: int
    filtered: int


class Manifest(Section):
    """Facts of a shard set, next to the shards and in runs trained on them."""

    schema_version: int = SCHEMA_VERSION
    encoding_hash: str
    """Hash of transform, VAE, text encoder and code version. Shards of two encodings never mix."""
    vae: VaeFacts
    text: TextFacts
    latents: LatentFormat
    frames: int
    fps: float
    height: int
    width: int
    """Default shape of samples: `commonest_shape` of the buckets."""
    buckets: dict[str, int]
    """Rows of each bucket of the recipe, including empty ones."""
    held_out: dict[str, int] = {}
    """In a run's copy: number of held-out clips by bucket."""
    settings: dict[str, Any] = {}
    """The recipe's `data` and `selection`, with which a clip's frames can be decoded again."""
    empty_text: str
    """The empty prompt's embedding, `[empty_tokens, width]` as base64 of float16: its `</s>` and one padding token."""
    empty_tokens: int
    """2, or 1 in shards of earlier versions, which did not save the padding."""
    counts: Counts
    reasons: dict[str, int]
    """Number of missing clips by reason."""
    remarks: dict[str, int] = {}
    """Number of sources by remark, such as `hdr`. Their clips were encoded nevertheless."""

    def save(self, folder: str) -> None:
        """Writes `folder/manifest.json` atomically."""
        system, path = resolve(folder)
        atomic_write(system, f"{path}/manifest.json", self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, folder: str) -> Manifest:
        """Reads `folder/manifest.json`.

        Raises UserError if it is missing or has another schema version.
        """
        system, path = resolve(folder)
        content = read_bytes(system, f"{path}/manifest.json")
        if content is None:
            raise UserError(
                f"no manifest.json in {folder}: encode the clips first with `sora prep RECIPE`", code="shards"
            )
        try:
            found = cls.model_validate_json(content)
            # Older manifests named the largest shape.
            shape = commonest_shape(found.buckets) or (found.frames, found.height, found.width)
            return found.model_copy(update=dict(zip(("frames", "height", "width"), shape, strict=True)))
        except ValueError as error:
            if f'"schema_version":{SCHEMA_VERSION},' in content.decode(errors="replace").replace(" ", ""):
                raise UserError(f"{folder}/manifest.json can't be read: {error}", code="shards") from error
            raise UserError(
                f"{folder}/manifest.json is not of schema version {SCHEMA_VERSION}, which this version of sora_train "
                "reads: encode the clips again with `sora prep RECIPE` into another data.output",
                code="shards",
            ) from None

    def null_embedding(self, null_prompt: str) -> np.ndarray:
        """The empty prompt's embedding in float16.

        With `eos` it is `[1, width]`, with `padded` `[max_tokens, width]`, which the caller cuts. All padding tokens
        have the same embedding, because each attends only to the `</s>`. Raises UserError if the shards have no
        embedding of padding.
        """
        content = base64.b64decode(self.empty_text)
        tokens = np.frombuffer(content, np.float16).reshape(self.empty_tokens, self.text.width)
        if null_prompt != "padded":
            return tokens[:1]
        if len(tokens) < 2:
            raise UserError(
                "codec.null_prompt is padded, but the shards were made by an earlier version, which did not keep the "
                "padding's embedding. Run `sora prep` again, or set codec.null_prompt: eos",
                code="codec",
            )
        return tokens[[0] + [1] * (self.text.max_tokens - 1)]
