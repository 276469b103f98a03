"""The pipeline's sink: decides which clips to keep, has them written, and records failures and progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pyarrow as pa

from data_prep.commits import COMMIT_EVERY_S, Commits
from data_prep.duplicates import Duplicates
from data_prep.reasons import remark_kinds
from data_prep.resume import ResumeState, SourceRecord, save_quarantine
from data_prep.schemas import END_OF_SOURCE, NOT_STARTED
from data_prep.watchdog import WRITE_TIMEOUT_S
from sora_train.errors import UserError
from sora_train.recipe import Recipe

if TYPE_CHECKING:
    from ray import ObjectRef

    from data_prep.writers import ShardWriters


class ShardSink:
    """Consumes blocks in the order of the sources, so the first of two duplicates is always kept."""

    def __init__(self, recipe: Recipe, encoding_hash: str, settings_hash: str, state: ResumeState):
        self.folder, self.encoding_hash, self.settings_hash = recipe.data.output, encoding_hash, settings_hash
        self.shard_bytes = recipe.prep.shard_mb * 10**6
        self.state, self.stats = state, state.stats
        self._writers: ShardWriters | None = None
        self.shards = 0
        """Number of shards that this run has finished."""
        self.commits = Commits(self.folder, encoding_hash, settings_hash)
        self.committed_at = time.monotonic()
        self.saved_failures = len(self.stats.failures)
        self.duplicates = Duplicates(recipe.selection)
        for table in state.known_hashes():
            self.duplicates.add_table(table)
        self.empty_text = b""

    @property
    def writers(self) -> ShardWriters:
        """The writers of shards, which need a process that is connected to Ray."""
        from data_prep.writers import ShardWriters

        self._writers = self._writers or ShardWriters(self.folder, self.encoding_hash, self.shard_bytes)
        return self._writers

    def consume(self, facts: pa.Table, block: ObjectRef) -> tuple[int, int, int, int]:
        """Takes a block of ENCODED, in Ray's object store, by its FACTS.

        Returns the number of sources finished, and of clips kept, quarantined and filtered. Raises UserError if too
        many sources are bad, a worker can't start, or a shard can't be written; and PipelineStalled.
        """
        rows = facts.to_pylist()
        if messages := [row["message"] for row in rows if row["reason"] == NOT_STARTED]:
            raise UserError(messages[0], code="workers")
        counts = {"sources": 0, "written": 0, "quarantined": 0, "filtered": 0}
        good: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            if row["note"]:
                self.stats.print_remark(row["note"])
            if row["reason"] == END_OF_SOURCE:
                self._finish_source(row)
                counts["sources"] += 1
                continue
            if self.state.holds(row["sample_id"]):  # in a bucket that it no longer belongs to
                self.state.discard(row["sample_id"])
            if self._is_good(row):
                good.setdefault(row["bucket"], []).append(i)
                counts["written"] += 1
            else:
                counts[self.stats.count_failure(row)] += 1
        self.empty_text = self.empty_text or self.writers.empty_text(block)
        self.writers.add(block, good, rows)
        self._count_finished()
        if time.monotonic() - self.committed_at > COMMIT_EVERY_S:
            self.commit()
        self.stats.check_limits()
        return counts["sources"], counts["written"], counts["quarantined"], counts["filtered"]

    def flush(self, timeout_s: float = WRITE_TIMEOUT_S) -> None:
        """Writes the remaining clips, and waits for it. Raises UserError and PipelineStalled as `consume`."""
        if self._writers is not None:
            try:
                self._writers.flush(timeout_s)
            finally:
                self._count_finished()
                self.commit()
                self._writers.cancel()
                self._writers = None

    def commit(self) -> None:
        """Records in the index what is finished, and removes stale clips. Raises UserError if it can't be written."""
        self.commits.save_shards()
        self.state.remove_stale(self.folder)  # before a source is finished, none of its clips may be there twice
        failures = pa.concat_tables(self.stats.failures.tables(self.saved_failures))
        self.saved_failures = len(self.stats.failures)
        self.commits.save_sources(failures, self._writers.unwritten() if self._writers else ())
        self.committed_at = time.monotonic()

    def close(self) -> None:
        """Records what is finished, and writes the list of failures."""
        self.commit()
        save_quarantine(self.folder, self.settings_hash, self.stats.failures.tables())

    def _count_finished(self) -> None:
        shards = self.writers.take_finished()
        self.shards += len(shards)
        self.commits.shards += shards

    def _is_good(self, row: dict) -> bool:
        """Counts a clip as kept, unless it has a reason or is a duplicate."""
        if row["reason"]:
            return False
        looks = row["content_hash"], row["perceptual_hash"], (row["start_s"], row["end_s"])
        found = self.duplicates.find(*looks)
        if found and found[1] != row["sample_id"]:
            row["reason"], row["duplicate_of"], source = found
            row["message"] = f"like {source} (clip {found.sample_id})"
            return False
        self.duplicates.add(row["sample_id"], row["source"], *looks)
        self.stats.count_written(row["source"])
        if row["remark"]:
            self.stats.print_remark(f"{row['source']} {row['remark']}")
        return True

    def _finish_source(self, row: dict) -> None:
        """Records a source all of whose clips have come."""
        kinds = sorted(set(remark_kinds(row["remark"] or "")))
        self.stats.count_opened(row["source"])
        record = SourceRecord(row["source"], row["source_size"], row["source_version"], row["asked"], kinds)
        self.commits.records[row["row_id"]] = self.state.finish(row["row_id"], record)
