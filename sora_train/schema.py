"""The contract of a shard: its columns, and how a row is encoded and decoded.

One row is one clip. Tensors are float16 bytes whose shapes follow from the bucket's name and the manifest, so any
Parquet reader can read them. Latents are raw, as the VAE returns them. No torch.

To add a column to the shards, see `data_prep/schemas.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from sora_train.manifest import Manifest
from sora_train.storage import resolve, storage_errors

ROW_GROUP = 32
"""Rows of a row group. A reader must read whole row groups."""
ENCODING_KEY = b"encoding_hash"
"""Key in a Parquet file's metadata. Its value is the hash of the file's encoding."""

SHARD_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("source_size", pa.int64()),
        ("source_version", pa.string()),
        ("content_hash", pa.string()),
        ("perceptual_hash", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("captions", pa.list_(pa.string())),
        ("latents", pa.large_binary()),
        ("text", pa.list_(pa.large_binary())),
        ("tokens", pa.list_(pa.int32())),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("source_size", pa.int64()),
        ("source_version", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("kind", pa.string()),
        ("duplicate_of", pa.string()),
    ]
)


@dataclass
class Clips:
    """Decoded rows in float16.

    `latents` are raw, `[rows, moments, f, c, h, w]`. `text` has one `[tokens, width]` per caption.
    """

    sample_ids: list[str]
    sources: list[str]
    captions: list[list[str]]
    latents: np.ndarray
    text: list[list[np.ndarray]]


def encode_row(
    *,
    sample_id: str,
    source: str,
    source_size: int,
    source_version: str,
    content_hash: str,
    perceptual_hash: str = "",
    start_s: float,
    end_s: float,
    captions: list[str],
    latents: np.ndarray,
    text: list[np.ndarray],
) -> dict[str, Any]:
    """A row of SHARD_SCHEMA from latents and one embedding per caption.

    `latents` are `[moments, f, c, h, w]`, an embedding is `[tokens, width]`. Raises ValueError if captions and
    embeddings differ in number, or if a value is not finite in float16.
    """
    if len(captions) != len(text) or not captions:
        raise ValueError(f"{source}: {len(captions)} captions and {len(text)} embeddings; need one embedding each")
    halves = [
        to_float16(array, f"{source}: {what}") for array, what in ((latents, "latents"), *((e, "text") for e in text))
    ]
    return {
        "sample_id": sample_id,
        "source": source,
        "source_size": source_size,
        "source_version": source_version,
        "content_hash": content_hash,
        "perceptual_hash": perceptual_hash,
        "start_s": start_s,
        "end_s": end_s,
        "captions": list(captions),
        "latents": halves[0].tobytes(),
        "text": [half.tobytes() for half in halves[1:]],
        "tokens": [len(half) for half in halves[1:]],
    }


def to_float16(array: np.ndarray, what: str) -> np.ndarray:
    """The array in float16. Raises ValueError if the result has NaN or infinity."""
    with np.errstate(over="ignore"):
        half = np.asarray(array).astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"{what} are not finite in float16")
    return half


def decode_rows(table: pa.Table, manifest: Manifest, bucket: str) -> Clips:
    """Rows of SHARD_SCHEMA as arrays.

    Raises ValueError, with the sample's id, for a row of another shape.
    """
    frames, height, width = bucket_size(bucket)
    shape = (manifest.latents.moments, *manifest.vae.latent_shape(frames, height, width))
    latents = np.empty((len(table), *shape), np.float16)
    text: list[list[np.ndarray]] = []
    columns: dict[str, list[Any]] = {
        name: table.column(name).to_pylist() for name in ("sample_id", "source", "captions", "tokens")
    }
    for row, (value, embeddings) in enumerate(zip(table.column("latents"), table.column("text"), strict=True)):
        content = np.frombuffer(value.as_buffer(), np.float16)
        if content.size != latents[row].size:
            raise ValueError(f"{columns['sample_id'][row]}: {content.size} numbers in latents, not {shape} of {bucket}")
        latents[row] = content.reshape(shape)
        text.append(
            [
                # Views, not copies: embeddings are most of the table's bytes.
                np.frombuffer(embedding.as_buffer(), np.float16).reshape(tokens, manifest.text.width)
                for embedding, tokens in zip(embeddings.values, columns["tokens"][row], strict=True)
            ]
        )
    return Clips(columns["sample_id"], columns["source"], columns["captions"], latents, text)


def bucket_name(frames: int, height: int, width: int) -> str:
    """A bucket's name, such as `16x256x256`: frames, height and width in pixels."""
    return f"{frames}x{height}x{width}"


def bucket_size(bucket: str) -> tuple[int, int, int]:
    """Frames, height and width from a bucket's name."""
    frames, height, width = (int(number) for number in bucket.split("x"))
    return frames, height, width


def holdout_hash(source: str) -> int:
    """64 bits of a source's name. The source is held out if they are below `data.holdout_fraction` of 2⁶⁴."""
    return int.from_bytes(hashlib.blake2b(f"holdout\0{source}".encode(), digest_size=8).digest(), "little")


def list_shards(folder: str) -> list[fs.FileInfo]:
    """The finished shards of a folder, which match `bucket=*/*.parquet`, sorted by path."""
    system, path = resolve(folder)
    with storage_errors(folder, "listed"):
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        buckets = [
            info.path for info in found if info.type == fs.FileType.Directory and info.base_name.startswith("bucket=")
        ]
        files = [info for bucket in buckets for info in system.get_file_info(fs.FileSelector(bucket))]
    shards = [info for info in files if info.extension == "parquet" and not info.base_name.startswith(".")]
    return sorted(shards, key=lambda info: info.path)


def shard_files(folder: str) -> list[str]:
    """Paths of a folder's finished shards on its filesystem, sorted."""
    return [info.path for info in list_shards(folder)]


def bucket_of(shard: str) -> str:
    """The bucket's name, from a shard's path."""
    return shard.split("/")[-2].removeprefix("bucket=")
