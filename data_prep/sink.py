"""The pipeline's sink: decides which clips to keep, has them written, and records failures and progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pyarrow as pa

from data_prep.filters import Duplicates
from data_prep.reasons import remark_kinds
from data_prep.resume import ResumeState, SourceRecord, save_progress
from data_prep.schemas import END_OF_SOURCE, NOT_STARTED
from data_prep.watchdog import WRITE_TIMEOUT_S
from sora_train.errors import UserError
from sora_train.recipe import Recipe

if TYPE_CHECKING:
    from ray import ObjectRef

    from data_prep.writers import ShardWriters

SAVE_EVERY_S, MAX_SAVING_SHARE = 30.0, 0.05
"""Progress is saved as a whole: every 30 s, or less often if saving would take more than this share of the time. With a
million sources it is hundreds of megabytes."""


def save_interval_s(saving_s: float) -> float:
    """Seconds until progress is saved again, if saving took `saving_s`."""
    return max(SAVE_EVERY_S, saving_s / MAX_SAVING_SHARE)


class ShardSink:
    """Consumes blocks in the order of the sources, so the first of two duplicates is always kept."""

    def __init__(self, recipe: Recipe, encoding_hash: str, settings_hash: str, state: ResumeState):
        self.folder, self.encoding_hash, self.settings_hash = recipe.data.output, encoding_hash, settings_hash
        self.shard_bytes = recipe.prep.shard_mb * 10**6
        self.state, self.stats = state, state.stats
        self._writers: ShardWriters | None = None
        self.shards = 0
        """Finished by this run."""
        self.duplicates = Duplicates(recipe.selection)
        for table in state.known_hashes():
            self.duplicates.add_table(table)
        self.empty_text = b""
        self.saved_at, self.save_after_s = time.monotonic(), SAVE_EVERY_S

    @property
    def writers(self) -> ShardWriters:
        """They need a process that is connected to Ray."""
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
            raise UserError(messages[0], code="worker")
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
        self.shards += len(self.writers.take_finished())
        if time.monotonic() - self.saved_at > self.save_after_s:
            self._save()
        self.stats.check_limits()
        return counts["sources"], counts["written"], counts["quarantined"], counts["filtered"]

    def flush(self, timeout_s: float = WRITE_TIMEOUT_S) -> None:
        """Writes the remaining clips, and waits for it. Raises UserError and PipelineStalled as `consume`."""
        if self._writers is not None:
            try:
                self._writers.flush(timeout_s)
            finally:
                self.shards += len(self._writers.take_finished())
                self._writers.cancel()
                self._writers = None

    def close(self) -> None:
        """Removes stale clips from the shards, and saves progress."""
        self._save()

    def _is_good(self, row: dict) -> bool:
        """Counts a clip as kept, unless it has a reason or is a duplicate."""
        if row["reason"]:
            return False
        looks = row["content_hash"], row["perceptual_hash"], (row["start_s"], row["end_s"])
        found = self.duplicates.find(*looks)
        if found and found[1] != row["sample_id"]:
            row["reason"], row["duplicate_of"] = found
            row["message"] = f"like {self.duplicates.sources[found[1]]} (clip {found[1]})"
            return False
        self.duplicates.add(row["sample_id"], row["source"], *looks)
        self.stats.count_written(row["source"])
        if row["remark"]:
            self.stats.print_remark(f"{row['source']} {row['remark']}")
        return True

    def _finish_source(self, row: dict) -> None:
        """Records a source all of whose clips have come."""
        kinds = sorted(set(remark_kinds(row["remark"] or "")))
        self.stats.opened.add(row["source"])
        record = SourceRecord(row["source"], row["source_size"], row["source_version"], row["asked"], kinds)
        self.state.finish(row["row_id"], record)

    def _save(self) -> None:
        began = time.monotonic()
        self.state.remove_stale(self.folder)  # first: a source saved as finished must not be in the shards twice
        save_progress(self.folder, self.settings_hash, self.state.records, self.stats.failures)
        self.saved_at = time.monotonic()
        self.save_after_s = save_interval_s(self.saved_at - began)
