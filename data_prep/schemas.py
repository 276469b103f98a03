"""Arrow schemas of the tables that travel from stage to stage.

To add a column to the shards: add it to `SHARD_SCHEMA` and `encode_row` in `sora_train/schema.py`. If the decoder finds
its value, add it to CLIPS and set it in `stages.Decode.clips`; else pass it in `stages.EmbedText.encode`.
"""

from __future__ import annotations

import pyarrow as pa

from data_prep.sources import SourceRow
from sora_train.schema import SHARD_SCHEMA

END_OF_SOURCE = "end"
"""The `reason` of the row that follows a source's last clip; its `asked` are the ids of all clips of the source."""
NOT_STARTED = "not_started"
"""The `reason` of a row from a stage whose worker can't start; its `message` says why."""
STRING, STRINGS, BYTES = pa.string(), pa.list_(pa.string()), pa.large_binary()
SOURCE = {"row_id": STRING, "source": STRING, "captions": STRINGS, "source_size": pa.int64(), "source_version": STRING}
SOURCES = pa.schema(SOURCE | {"path": STRING, "skip": STRINGS})
SPAN = {"start_s": pa.float64(), "end_s": pa.float64()}
HASHES = {"content_hash": STRING, "perceptual_hash": STRING}
RESULT = {"reason": STRING, "message": STRING, "remark": STRING, "note": STRING, "asked": STRINGS}
WORK = pa.list_(pa.struct([("stage", STRING), ("worker", STRING), ("seconds", pa.float64())]))
"""How long stages worked on a table; its first row carries it."""
CLIPS = pa.schema(SOURCE | {"sample_id": STRING, "bucket": STRING} | SPAN | HASHES | RESULT | {"work": WORK})
DECODED = pa.schema([*CLIPS, pa.field("frames", BYTES)])
WITH_LATENTS = pa.schema([*CLIPS, pa.field("latents", BYTES)])
ENCODED = pa.schema([*CLIPS, *(field for field in SHARD_SCHEMA if field.name not in CLIPS.names),
                     pa.field("empty_text", BYTES)])  # fmt: skip
FACTS = pa.schema([*CLIPS, SHARD_SCHEMA.field("tokens"), pa.field("bytes", pa.int64())])
"""The columns of ENCODED that the driver gets: no tensors. `bytes` is the size of latents and text."""


def to_table(sources: list[tuple[SourceRow, list[str]]]) -> pa.Table:
    """The first stage's input: sources, and the ids of those of their clips to skip."""
    rows = [
        {"row_id": row.row_id, "source": row.source, "captions": row.captions, "source_size": row.size,
         "source_version": row.version, "path": row.path, "skip": skip}
        for row, skip in sources
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, SOURCES)
