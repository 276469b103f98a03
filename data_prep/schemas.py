"""The Arrow tables that travel from stage to stage."""

from __future__ import annotations

import pyarrow as pa

from data_prep.sources import SourceRow
from sora_train.schema import SHARD_SCHEMA

END_OF_SOURCE = "end"
"""The `reason` of the row that follows a source's last clip; its `asked` are the ids of all that it was cut into."""
SOURCES = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("done", pa.list_(pa.string())),
    ]
)
CLIPS = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("sample_id", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("bucket", pa.string()),
        ("content_hash", pa.string()),
        ("perceptual_hash", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("remark", pa.string()),
        ("note", pa.string()),
        ("asked", pa.list_(pa.string())),
    ]
)
DECODED = pa.schema([*CLIPS, pa.field("frames", pa.large_binary())])
WITH_LATENTS = pa.schema([*CLIPS, pa.field("latents", pa.large_binary())])
ENCODED = pa.schema([*CLIPS, *(field for field in SHARD_SCHEMA if field.name not in CLIPS.names),
                     pa.field("empty_text", pa.large_binary())])  # fmt: skip


def to_table(rows: list[tuple[SourceRow, list[str]]]) -> pa.Table:
    """Sources, and the ids of those of their clips that need not be made, as the first stage takes them."""
    columns = [name for name in SOURCES.names if name != "done"]
    return pa.Table.from_pylist([{name: getattr(row, name) for name in columns} | {"done": done} for row, done in rows],
                                SOURCES)  # fmt: skip
