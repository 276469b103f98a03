"""Resume: compares the recipe with what earlier runs wrote, to find the sources that still have clips to encode.

The index next to the shards has the clips of each finished source (`sources`), and the reasons why some are missing
(`failures`). Without these sources are opened again, but no clip that the shards hold is encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.compare import DONE, FAILED, TODO, Comparison, SavedProgress, compare
from data_prep.sources import SourceRow, SourceRows
from data_prep.stats import PrepStats
from data_prep.stored import StoredClips, drop_clips
from sora_train import index
from sora_train.data.config import DataConfig
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.schema import QUARANTINE_SCHEMA, bucket_name, bucket_of
from sora_train.storage import atomic_output, resolve, storage_errors

SETTINGS_KEY = "settings_hash"
HASHES = ["sample_id", "source", "content_hash", "perceptual_hash", "start_s", "end_s"]
PendingSource = tuple[SourceRow, list[str]]
"""A source to open, and the clips of it to skip: `bucket/sample_id`, or `sample_id` in any bucket."""


@dataclass(slots=True)
class SourceRecord:
    """A source that was processed to its end: its file, the ids of all its clips, and names of `reasons.REMARKS`."""

    source: str
    source_size: int
    source_version: str
    sample_ids: list[str]
    remarks: list[str] = field(default_factory=list)


class ResumeState:
    """The sources to process and the clips to skip or remove; the sink updates it. Clips in the shards have a place."""

    def __init__(self, stats: PrepStats, rows: SourceRows, stored: StoredClips, found: Comparison):
        self.stats, self.stored = stats, stored
        self.remarks = found.remarks
        """Number of sources that need no more work, by the kinds of their remarks."""
        self.is_pending, self.is_done = found.outcome == TODO, found.outcome == DONE
        self.pending = int(self.is_pending.sum())
        """The number of sources to open."""
        self._rows, self._found, self._stale = rows, found, found.stale.tolist()
        self._skip_rows, self._skip_places = (found.skip[name].to_numpy() for name in ("number", "place"))
        self._places: dict[str, int] = {}
        """Places of stored clips by `sample_id`, for the sources that `rounds` has yielded."""
        self._stored_of: dict[str, list[str]] = {}
        """Ids of these clips by the `row_id` of their source."""

    def rounds(self, size: int) -> Iterator[list[PendingSource]]:
        """Yields the sources to open in the order of the rows, about `size` at once."""
        some: list[PendingSource] = []
        for numbers, rows in self._rows.select(self.is_pending):
            starts, ends = (np.searchsorted(self._skip_rows, numbers, side) for side in ("left", "right"))
            some += [
                (row, self._skipped(row, start, end) if end > start else [])
                for row, start, end in zip(rows, starts.tolist(), ends.tolist(), strict=True)
            ]
            if len(some) >= size:
                yield some
                some = []
        if some:
            yield some

    def _skipped(self, row: SourceRow, start: int, end: int) -> list[str]:
        """Ids of clips to skip. One that the shards hold is skipped only if it belongs in the same bucket."""
        skipped: list[Any] = self._found.skip["sample"].slice(start, end - start).to_pylist()
        ids = [sample.hex() for sample in skipped]
        places = dict(zip(ids, self._skip_places[start:end].tolist(), strict=True))
        stored = {sample: place for sample, place in places.items() if place >= 0}
        self._places |= stored
        self._stored_of[row.row_id] = list(stored)
        return [
            f"{bucket_of(self.stored.shard_of(place))}/{sample}" if place >= 0 else sample
            for sample, place in places.items()
        ]

    def holds(self, sample_id: str) -> bool:
        """Whether a clip of a source that `rounds` has yielded, and that is not finished, is in the shards."""
        return sample_id in self._places

    def finish(self, row_id: str, record: SourceRecord) -> SourceRecord:
        """Counts a source of `rounds` that needs no more work, and discards its stored clips that it no longer has.

        A source that could not be opened has its `row_id` as only clip, and keeps those in the shards. Returns the
        record to save.
        """
        stored = self._stored_of.pop(row_id, [])
        if record.sample_ids == [row_id]:
            record.sample_ids = [*record.sample_ids, *stored]
        for sample in set(stored) - set(record.sample_ids):
            if self.holds(sample):
                self.discard(sample)
        for sample in stored:
            self._places.pop(sample, None)
        self.stats.asked += len(record.sample_ids)
        self.remarks.update(record.remarks)
        return record

    def discard(self, sample_id: str) -> None:
        """Marks a clip for which `holds` is true for removal, and no longer counts it as written."""
        self._stale.append(self._places.pop(sample_id))
        self.stats.written -= 1

    def kept(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yields the clips that stay, with columns of `index.CLIPS` and `place`. Call it before the sink consumes."""
        for table in self.stored.read(columns):
            yield table.filter(pa.array(~np.isin(table["place"].to_numpy(), self._found.stale)))

    def kept_sources(self) -> Iterator[pa.Table]:
        """Yields source and shard of clips in the shards that stay, and whether their row `is_finished`."""
        for table in self.kept(["source", "shard"]):
            is_finished = ~np.isin(table["place"].to_numpy(), self._skip_places)
            columns = [table["source"], table["shard"].cast(pa.string()), pa.array(is_finished)]
            yield pa.table(columns, ["source", "shard", "is_finished"])

    def known_hashes(self) -> Iterator[pa.Table]:
        """Yields tables of HASHES of the clips in the shards, to find duplicates of them."""
        for table in self.kept(HASHES):
            yield table.select(HASHES)

    def remove_stale(self, folder: str) -> None:
        """Removes stale clips from the shards."""
        if self._stale:
            why = "repeated, no longer asked for (or with another caption), or of a changed file"
            log.info(f"prep: drops {len(self._stale)} clips: {why}")
            drop_clips(folder, self.stored, np.array(self._stale, np.int64))
        self._stale.clear()


def reconcile(
    data: DataConfig, rows: SourceRows, stored: StoredClips, saved: SavedProgress, stats: PrepStats
) -> ResumeState:
    """Compares the recipe's rows with the shards and the saved progress; counts in `stats` what needs no work.

    Raises UserError if the shards hold only clips of other sources or other buckets: then `data.output` is the wrong
    folder.
    """
    wanted = {bucket_name(*shape) for shape in data.shapes}
    found = compare(rows, stored, np.array([bucket_of(shard) in wanted for shard in stored.shards], bool), saved)
    _check_output_folder(data, rows, stored, wanted, found)
    stats.count_stored(found.kept, found.kept_sources)
    stats.asked += found.asked
    number = 0
    for table in saved.failures(QUARANTINE_SCHEMA.names):
        begin, end = np.searchsorted(found.failures, [number, number + len(table)])
        for failure in table.take(found.failures[begin:end] - number).to_pylist():
            stats.count_failure(failure, known=True)
        number += len(table)
    for _, failed in rows.select(found.outcome == FAILED):
        stats.asked += len(failed)
        for row in failed:
            file = {"source": row.source, "source_size": row.size, "source_version": row.version}
            stats.count_failure({"sample_id": row.row_id, "reason": row.reason, "message": row.message} | file)
    return ResumeState(stats, rows, stored, found)


def _check_output_folder(
    data: DataConfig, rows: SourceRows, stored: StoredClips, wanted: set[str], found: Comparison
) -> None:
    if not found.clips:
        return
    advice = "Set data.output to another folder, or delete this one"
    if found.is_strange and not any(rows.has_any(table["source"]) for table in stored.read(["source"])):
        example = next(table["source"][0] for table in stored.read(["source"]) if len(table))
        raise UserError(
            f"data.output: {data.output} holds {found.clips} clips of other sources, such as {example}, and none that "
            f"data.captions names. {advice}",
            code="shards",
        )
    buckets = {bucket_of(shard) for shard in stored.shards}
    if not buckets & wanted:
        names, asked = (", ".join(sorted(some)) for some in (buckets, wanted))
        raise UserError(
            f"data.output: {data.output} holds clips of {names}; the recipe asks for {asked}. {advice}", code="shards"
        )


def load_progress(folder: str, settings_hash: str) -> SavedProgress:
    """What earlier runs with these settings saved: in files, by older versions, and in the index."""

    def read(kind: index.Kind, file: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        yield from _read_file(folder, file, settings_hash, columns)
        yield from index.read(folder, kind, columns, {SETTINGS_KEY: settings_hash})

    return SavedProgress(
        lambda columns: read("sources", "sources", columns), lambda columns: read("failures", "quarantine", columns)
    )


def save_quarantine(folder: str, settings_hash: str, failures: Iterable[pa.Table]) -> None:
    """Writes all failures to one file, for people and for `sora inspect`."""
    system, path = resolve(folder)
    schema = QUARANTINE_SCHEMA.with_metadata({SETTINGS_KEY: settings_hash})
    with atomic_output(system, f"{path}/quarantine.parquet") as file, pq.ParquetWriter(file, schema) as writer:
        for table in failures:
            writer.write_table(table)


def _read_file(folder: str, name: str, settings_hash: str, columns: Sequence[str]) -> list[pa.Table]:
    system, path = resolve(folder)
    file = f"{path}/{name}.parquet"
    with storage_errors(file, "read", system):
        if system.get_file_info(file).type != fs.FileType.File:
            return []
        # Neither `pq.read_table` nor a Python buffer: pyarrow's threads may still hold them when the interpreter shuts
        # down, and releasing them then aborts the process.
        with system.open_input_file(file) as opened:
            try:
                table = pq.ParquetFile(opened, pre_buffer=False).read(use_threads=False)
            except (pa.ArrowInvalid, OSError):  # damaged
                return []
    found = (table.schema.metadata or {}).get(SETTINGS_KEY.encode(), b"").decode()
    schema = QUARANTINE_SCHEMA if name == "quarantine" else index.SOURCES
    missing = [name for name in schema.names if name not in table.column_names]
    for name in missing:  # of an older version
        table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
    return [table.select(columns).replace_schema_metadata(None)] if found == settings_hash else []
