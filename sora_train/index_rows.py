"""Rows of the index: their schemas by kind, and how they are made of a shard's rows. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sora_train.schema import QUARANTINE_SCHEMA, SHARD_SCHEMA, holdout_hash

Kind = Literal["clips", "shards", "sources", "failures"]
STRING, STRINGS = pa.string(), pa.list_(pa.string())
OF_SHARD = ("sample_id", "source", "source_size", "source_version", "content_hash", "perceptual_hash", "start_s",
            "end_s", "tokens")  # fmt: skip
"""Columns of a shard that its clips have in the index."""
CLIPS = pa.schema(
    [("row_id", STRING)]
    + [(name, SHARD_SCHEMA.field(name).type) for name in OF_SHARD]
    + [("shard", pa.dictionary(pa.int32(), STRING)), ("row", pa.int32())]
)
"""A clip of a finished shard. `shard` is a path relative to the folder, `row` the clip's place in it."""
SHARDS = pa.schema(
    [
        ("shard", STRING),
        ("bytes", pa.int64()),
        ("encoding_hash", STRING),
        ("groups", pa.list_(pa.int32())),  # rows of each row group
        ("holdout", pa.list_(pa.uint64())),  # `holdout_hash` of each row's source
        ("dropped", pa.list_(pa.int32())),  # rows that no longer count, ascending
    ]
)
"""A finished shard. The last row of a shard is valid."""
SOURCES = pa.schema(
    [("row_id", STRING), ("source", STRING), ("source_size", pa.int64()), ("source_version", STRING),
     ("sample_ids", STRINGS), ("remarks", STRINGS)]
)  # fmt: skip
"""A source that was processed to its end. The last row of a `row_id` is valid."""
KINDS: dict[Kind, pa.Schema] = {"clips": CLIPS, "shards": SHARDS, "sources": SOURCES, "failures": QUARANTINE_SCHEMA}


def shard_row(shard: str, size: int, encoding_hash: str, groups: Sequence[int], sources: Sequence[str]) -> dict:
    """A row of SHARDS for a new shard: path relative to the folder, bytes, rows by row group, source of each row."""
    hashes = {source: holdout_hash(source) for source in set(sources)}
    return {
        "shard": shard,
        "bytes": size,
        "encoding_hash": encoding_hash,
        "groups": list(groups),
        "holdout": [hashes[source] for source in sources],
        "dropped": [],
    }


def clip_rows(rows: pa.Table, shard: str, row_ids: Sequence[str]) -> pa.Table:
    """Rows of CLIPS for all rows of a shard, a table with columns of SHARD_SCHEMA."""
    places = pa.array(np.arange(len(rows), dtype=np.int32))
    extra = {"row_id": pa.array(row_ids, STRING), "shard": pa.array([shard] * len(rows), STRING), "row": places}
    columns = [extra[name] if name in extra else rows[name] for name in CLIPS.names]
    return pa.table(columns, CLIPS.names).cast(CLIPS)


def shard_places(table: pa.Table, shards: pa.Array | pa.ChunkedArray) -> pa.Array:
    """For rows of CLIPS, the places of their shards among these, null for others."""
    column: Any = table["shard"].combine_chunks()
    wanted = shards.combine_chunks() if isinstance(shards, pa.ChunkedArray) else shards
    return pc.index_in(column.dictionary, value_set=wanted).take(column.indices)


def last_rows(table: pa.Table, key: str) -> pa.Table:
    """The last row for each value of a column, in the order of the table."""
    numbered = pa.table([table[key], pa.array(np.arange(len(table)))], ["key", "row"])
    last = numbered.group_by("key", use_threads=False).aggregate([("row", "max")])["row_max"]
    return table.take(np.sort(last.to_numpy()))
