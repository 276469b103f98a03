"""Brings in what comes out of the chain: duplicates are found, shards written, failures and records kept."""

from __future__ import annotations

import time

import pyarrow as pa

from data_prep.filters import Duplicates
from data_prep.ledger import SourceRecord, save_progress
from data_prep.reasons import remark_kinds
from data_prep.resume import ResumeState
from data_prep.schemas import END_OF_SOURCE
from data_prep.shards import ShardWriter
from data_prep.stats import PrepStats
from sora_train.recipe import Recipe
from sora_train.schema import SHARD_SCHEMA

SAVE_EVERY_S, SAVE_SHARE = 30.0, 0.05
"""The ledger is written whole: every so many seconds, or less often where saving would take more than this share of the
time, since a million sources are hundreds of megabytes."""


def pause_s(saving_s: float) -> float:
    """Seconds until the ledger is saved again, by how long saving it took."""
    return max(SAVE_EVERY_S, saving_s / SAVE_SHARE)


class ShardSink:
    """Takes tables of ENCODED in the order of the sources, so that of two duplicates the first is always kept."""

    def __init__(self, recipe: Recipe, encoding_hash: str, settings_hash: str, stats: PrepStats, state: ResumeState):
        self.folder, self.encoding_hash, self.settings_hash = recipe.data.output, encoding_hash, settings_hash
        self.stats, self.state = stats, state
        self.writers: dict[str, ShardWriter] = {}
        self.duplicates, self.sources = Duplicates(recipe.selection), dict[str, str]()
        for sample, clip in state.stored.items():
            self._remember(sample, clip.source, clip.content_hash, clip.perceptual_hash, clip.span)
        self.empty_text = b""
        self.saved_at, self.save_after_s = time.monotonic(), SAVE_EVERY_S

    def consume(self, table: pa.Table) -> tuple[int, int, int, int]:
        """Returns how many sources were finished, and clips written, quarantined and filtered.

        Raises UserError where too many sources are bad.
        """
        rows = table.drop_columns(["latents", "text", "tokens"]).to_pylist()
        counts = {"sources": 0, "written": 0, "quarantined": 0, "filtered": 0}
        good: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            self.empty_text = self.empty_text or row["empty_text"] or b""
            if row["note"]:
                self.stats.log_remark(row["note"])
            if row["reason"] == END_OF_SOURCE:
                self._end(row)
                counts["sources"] += 1
                continue
            if row["sample_id"] in self.state.stored:  # the shards have it in a bucket that it no longer belongs to
                self.state.drop(row["sample_id"])
                self.stats.written -= 1
            if self._is_good(row):
                good.setdefault(row["bucket"], []).append(i)
                counts["written"] += 1
            else:
                counts[self.stats.count_failure(_failure(row))] += 1
        for bucket, places in good.items():
            if bucket not in self.writers:
                self.writers[bucket] = ShardWriter(self.folder, bucket, self.encoding_hash)
            self.writers[bucket].add(table.take(places).select(SHARD_SCHEMA.names))
        if time.monotonic() - self.saved_at > self.save_after_s:
            self._save()
        self.stats.check_limits()
        return counts["sources"], counts["written"], counts["quarantined"], counts["filtered"]

    def close(self) -> None:
        """Writes what is left, and takes out of the shards what their sources turned out not to be asked for."""
        for writer in self.writers.values():
            writer.close()
        self._save()

    def _is_good(self, row: dict) -> bool:
        """Enters a clip among those that are kept, unless it has a reason or is found to be a duplicate."""
        if row["reason"]:
            return False
        span = (row["start_s"], row["end_s"])
        found = self.duplicates.of(row["content_hash"], row["perceptual_hash"], span)
        if found and found[1] != row["sample_id"]:
            row["reason"], row["duplicate_of"] = found
            row["message"] = f"as {self.sources.get(found[1], 'another')} (clip {found[1]})"
            return False
        self._remember(row["sample_id"], row["source"], row["content_hash"], row["perceptual_hash"], span)
        self.stats.count_written(row["source"])
        if row["remark"]:
            self.stats.log_remark(f"{row['source']} {row['remark']}")
        return True

    def _remember(self, sample: str, source: str, content: str, looks: str, span: tuple[float, float]) -> None:
        """Takes note of a clip that is kept, for those that come after it."""
        if self.duplicates.enabled:
            self.duplicates.remember(sample, content, looks, span)
            self.sources[sample] = source

    def _end(self, row: dict) -> None:
        """Settles a source that was gone through."""
        mine, asked = self.state.of_row.get(row["row_id"], []), row["asked"]
        if asked == [row["row_id"]]:  # it could not be cut: what the shards hold of it stays
            asked = [*asked, *mine]
        for sample in (set(mine) - set(asked)) & self.state.stored.keys():
            self.state.drop(sample)
            self.stats.written -= 1
        kinds = sorted(set(remark_kinds(row["remark"] or "")))
        self.stats.opened.add(row["source"])
        self.stats.record_source(row["row_id"], SourceRecord(row["source"], row["size"], row["version"], asked, kinds))

    def _save(self) -> None:
        began = time.monotonic()
        self.state.remove_stale(self.folder)  # first: what the ledger calls finished must not be in the shards twice
        save_progress(self.folder, self.settings_hash, self.stats.records, self.stats.failures)
        self.saved_at = time.monotonic()
        self.save_after_s = pause_s(self.saved_at - began)


def _failure(row: dict) -> dict:
    """A row of the quarantine, but for `stage` and `kind`."""
    names = ("sample_id", "source", "start_s", "end_s", "reason", "message")
    return {name: row[name] for name in names} | {
        "source_size": row["size"],
        "source_version": row["version"],
        "duplicate_of": row.get("duplicate_of", ""),
    }
