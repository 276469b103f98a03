"""Small shard sets, written as `data_prep` writes them."""

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sora_train.manifest import Manifest
from sora_train.schema import ROW_GROUP, SHARD_SCHEMA, bucket_name, encode_row

WIDTH = 6  # of a text embedding
MakeShards = Callable[..., str]


def manifest_of(moments: int, encoding_hash: str) -> Manifest:
    empty = np.full((1, WIDTH), 0.5, np.float16)
    return Manifest.model_validate(
        {
            "encoding_hash": encoding_hash,
            "vae": {"name": "v", "hash": "v", "channels": 4, "factor": 8, "mean": (0, 1, 2, 3), "std": (1, 2, 4, 8)},
            "text": {"name": "t", "hash": "t", "width": WIDTH, "max_tokens": 9},
            "latents": {"moments": moments},
            "frames": 3,
            "fps": 8,
            "height": 16,
            "width": 24,
            "buckets": {},
            "empty_text": base64.b64encode(empty.tobytes()).decode(),
            "empty_tokens": 1,
            "counts": {"asked": 0, "written": 0, "quarantined": 0, "filtered": 0},
            "reasons": {},
        }
    )


def row_of(bucket: tuple[int, int, int], number: int, moments: int) -> dict:
    """Clip `number`: three clips of a source follow each other; it has one caption, or two where the number is odd."""
    frames, height, width = bucket
    random = np.random.default_rng(number)
    captions = [f"caption {i} of {number}" for i in range(1 + number % 2)]
    return encode_row(
        sample_id=f"{number:08x}",
        source=f"video_{number // 3}.mp4",
        source_size=1,
        source_version="",
        content_hash="",
        start_s=float(number % 3),
        end_s=number % 3 + 1.0,
        captions=captions,
        latents=random.standard_normal((moments, frames, 4, height // 8, width // 8)),
        text=[random.standard_normal((1 + (number + i) % 5, WIDTH)) for i in range(len(captions))],
    )


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Writes files of so many rows each into a bucket of a folder, and says where; clips are numbered through."""

    def make(
        *files: int,
        bucket: tuple[int, int, int] = (3, 16, 24),
        start: int = 0,
        moments: int = 2,
        encoding_hash: str = "e1",
        folder: str = "shards",
        row_group: int = ROW_GROUP,
    ) -> str:
        place = tmp_path / folder / f"bucket={bucket_name(*bucket)}"
        place.mkdir(parents=True, exist_ok=True)
        schema = SHARD_SCHEMA.with_metadata({"encoding_hash": encoding_hash})
        for i, rows in enumerate(files):
            table = pa.Table.from_pylist([row_of(bucket, start + row, moments) for row in range(rows)], schema)
            pq.write_table(table, place / f"{i:04d}.parquet", row_group_size=row_group, write_page_checksum=True)
            start += rows
        manifest_of(moments, encoding_hash).save(str(tmp_path / folder))
        return str(tmp_path / folder)

    return make
