"""Commits: every half minute, what a run has finished is appended to the index of the shard folder."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict
from typing import Any, Protocol

import pyarrow as pa

from data_prep.resume import SETTINGS_KEY, SourceRecord
from data_prep.shard_index import MAX_PIECES, compact_index
from sora_train import index
from sora_train.schema import ROW_GROUP, bucket_of

COMMIT_EVERY_S = 30.0


class FinishedShard(Protocol):
    """A shard that is complete on storage."""

    path: str
    size: int
    facts: list[dict[str, Any]]
    """The columns of each row except the tensors, and its `row_id`."""


class Commits:
    """Collects what is finished and not yet in the index."""

    def __init__(self, folder: str, encoding_hash: str, settings_hash: str):
        self.folder, self.encoding_hash = folder, encoding_hash
        self.settings = {SETTINGS_KEY: settings_hash}
        self.shards: list[FinishedShard] = []
        self.records: dict[str, SourceRecord] = {}
        self.commits = 0

    def save_shards(self) -> None:
        """Appends the finished shards and their clips. Raises UserError if they can't be written."""
        if self.shards:
            index.append(self.folder, "clips", pa.concat_tables(map(self._clips, self.shards)))
            index.append(self.folder, "shards", pa.Table.from_pylist(list(map(self._shard, self.shards)), index.SHARDS))
            self.shards.clear()

    def save_sources(self, failures: pa.Table, unwritten: Container[str]) -> None:
        """Appends failures, then the sources none of whose clips are `unwritten`. Raises UserError as `save_shards`.

        `failures` are rows of QUARANTINE_SCHEMA.
        """
        index.append(self.folder, "failures", failures, self.settings)
        done = {
            row_id: record
            for row_id, record in self.records.items()
            if not any(sample in unwritten for sample in record.sample_ids)
        }
        rows = [{"row_id": row_id, **asdict(record)} for row_id, record in done.items()]
        index.append(self.folder, "sources", pa.Table.from_pylist(rows, index.SOURCES), self.settings)
        for row_id in done:
            del self.records[row_id]
        self.commits += 1
        if self.commits % MAX_PIECES == 0:  # a run of days makes thousands
            compact_index(self.folder)

    def _clips(self, shard: FinishedShard) -> pa.Table:
        columns = [field for field in index.CLIPS if field.name not in ("shard", "row")]
        facts = pa.Table.from_pylist(shard.facts, pa.schema(columns))
        return index.clip_rows(facts, relative(shard.path), [fact["row_id"] for fact in shard.facts])

    def _shard(self, shard: FinishedShard) -> dict:
        rows = len(shard.facts)
        groups = [min(ROW_GROUP, rows - start) for start in range(0, rows, ROW_GROUP)]
        sources = [fact["source"] for fact in shard.facts]
        return index.shard_row(relative(shard.path), shard.size, self.encoding_hash, groups, sources)


def relative(path: str) -> str:
    """A shard's path relative to its folder."""
    return f"bucket={bucket_of(path)}/{path.rpartition('/')[2]}"
