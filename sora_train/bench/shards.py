"""Shards for benches without a dataset: noise of the sizes of real ones, by the shards' own writer."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.shards import ShardWriter
from sora_train.manifest import Counts, LatentFormat, Manifest, TextFacts, VaeFacts, latent_shape
from sora_train.schema import ROW_GROUP, SHARD_SCHEMA, bucket_name, encode_row

KEY = "bench"
CHANNELS, FACTOR = 4, 8


def make_shards(
    folder: str | Path, rows: int, shape: tuple[int, int, int], text_width: int, text_tokens: int
) -> str:  # fmt: skip
    """Writes so many clips of a shape (frames, height, width in pixels) with captions of a quarter to all of so many
    tokens, and returns the folder.
    """
    random = np.random.default_rng(0)
    frames, height, width = shape
    bucket = bucket_name(*shape)
    latents = latent_shape(CHANNELS, FACTOR, 1, frames, height, width)
    writer = ShardWriter(str(folder), bucket, KEY)
    for first in range(0, rows, ROW_GROUP):
        numbers = range(first, min(first + ROW_GROUP, rows))
        writer.add(pa.Table.from_pylist([row_of(n, latents, text_width, text_tokens, random) for n in numbers],
                                        SHARD_SCHEMA))  # fmt: skip
    writer.close()
    empty = np.zeros((1, text_width), np.float16)
    Manifest(
        encoding_hash=KEY,
        vae=VaeFacts(name="noise", hash=KEY, channels=CHANNELS, factor=FACTOR, mean=(0.0,) * 4, std=(1.0,) * 4),
        text=TextFacts(name="noise", hash=KEY, width=text_width, max_tokens=text_tokens),
        latents=LatentFormat(moments=1),
        frames=frames,
        fps=8.0,
        height=height,
        width=width,
        buckets={bucket: rows},
        empty_text=base64.b64encode(empty.tobytes()).decode(),
        empty_tokens=1,
        counts=Counts(asked=rows, written=rows, quarantined=0, filtered=0),
        reasons={},
    ).save(str(folder))
    return str(folder)


def row_of(
    number: int, shape: tuple[int, ...], text_width: int, text_tokens: int, random: np.random.Generator
) -> dict:  # fmt: skip
    """A row of SHARD_SCHEMA, of noise."""
    tokens = int(random.integers(max(text_tokens // 4, 1), text_tokens + 1))
    return encode_row(
        sample_id=f"{number:032x}",
        source=f"{number}.mp4",
        source_size=1,
        source_version="",
        content_hash="",
        start_s=0.0,
        end_s=1.0,
        captions=[f"clip {number}"],
        latents=random.standard_normal((1, *shape), dtype=np.float32),
        text=[random.standard_normal((tokens, text_width), dtype=np.float32)],
    )
