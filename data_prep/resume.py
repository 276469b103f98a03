"""Resume: compares the recipe with what earlier runs wrote, to find the sources that still have clips to encode.

The index next to the shards has the clips of each source, and the reasons why some are missing. Without it sources are
opened again, but no clip that the shards hold is encoded again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.reasons import PERMANENT
from data_prep.shard_index import drop_samples
from data_prep.shards import StoredClip
from data_prep.sources import SourceRow
from data_prep.stats import PrepStats
from sora_train import index
from sora_train.data.config import DataConfig
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.schema import QUARANTINE_SCHEMA, bucket_name, bucket_of
from sora_train.storage import atomic_output, resolve, storage_errors

SETTINGS_KEY = b"settings_hash"
OLD_FILES: dict[str, index.Kind] = {"sources": "sources", "quarantine": "failures"}
"""Where earlier versions saved what is now in the index."""
STRING = pa.string()
HASHES_SCHEMA = pa.schema({"sample_id": STRING, "source": STRING, "content_hash": STRING, "perceptual_hash": STRING,
                           "start_s": pa.float64(), "end_s": pa.float64()})  # fmt: skip
PendingSource = tuple[SourceRow, list[str]]
"""A source to open, and the clips of it to skip: `bucket/sample_id`, or `sample_id` in any bucket."""
ROUND_SOURCES = 100_000


@dataclass(slots=True)
class SourceRecord:
    """A source that was processed to its end: its file, the ids of all its clips, and names of `reasons.REMARKS`."""

    source: str
    source_size: int
    source_version: str
    sample_ids: list[str]
    remarks: list[str] = field(default_factory=list)


@dataclass
class SavedProgress:
    """What earlier runs saved: records by `row_id`, and rows of the quarantine by `sample_id`."""

    records: dict[str, SourceRecord] = field(default_factory=dict)
    failures: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str, settings_hash: str) -> SavedProgress:
        """Reads the index, and the files of earlier versions. What is damaged or of other settings is skipped."""
        made_by = {SETTINGS_KEY.decode(): settings_hash}
        sources, failures = (
            chain(_read(folder, file, settings_hash), *(t.to_pylist() for t in index.read(folder, kind, None, made_by)))
            for file, kind in OLD_FILES.items()
        )
        records = {row.pop("row_id"): SourceRecord(**row) for row in sources}
        return cls(records, {row["sample_id"]: row for row in failures})

    def permanent_failure(self, sample_id: str, record: SourceRecord, stored: Container[str]) -> dict | None:
        """The failure of a clip of this source, if another try would end the same way."""
        failure = self.failures.get(sample_id)
        if failure is None or failure["reason"] not in PERMANENT:
            return None
        if (failure["source_size"], failure["source_version"]) != (record.source_size, record.source_version):
            return None
        return failure if not failure["duplicate_of"] or failure["duplicate_of"] in stored else None


def save_quarantine(folder: str, settings_hash: str, failures: Iterable[dict]) -> None:
    """Writes all failures to one file, for people and for `sora inspect`."""
    system, path = resolve(folder)
    schema = QUARANTINE_SCHEMA.with_metadata({SETTINGS_KEY: settings_hash.encode()})
    with atomic_output(system, f"{path}/quarantine.parquet") as file:
        pq.write_table(pa.Table.from_pylist(list(failures), schema), file)


def _read(folder: str, name: str, settings_hash: str) -> list[dict]:
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
    found = (table.schema.metadata or {}).get(SETTINGS_KEY, b"").decode()
    return table.to_pylist() if found == settings_hash else []


@dataclass
class ResumeState:
    """What `reconcile` found, updated while the sink consumes clips."""

    stats: PrepStats
    todo: list[PendingSource] = field(default_factory=list)
    stored: dict[str, StoredClip] = field(default_factory=dict)
    """Clips in the shards that stay, by `sample_id`."""
    stored_of_row: dict[str, list[str]] = field(default_factory=dict)
    """Their ids by `row_id`."""
    stale: dict[str, set[str]] = field(default_factory=dict)
    """Clips to remove, by shard: they are repeated, no longer asked for, or their file has changed."""
    records: dict[str, SourceRecord] = field(default_factory=dict)
    """Sources that need no more work, by `row_id`."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Sources that need no more work, by the kinds of their remarks."""

    @property
    def pending(self) -> int:
        """The number of sources to open."""
        return len(self.todo)

    def rounds(self) -> Iterator[list[PendingSource]]:
        """Yields the sources to open in the order of the rows, at most ROUND_SOURCES at once."""
        for begin in range(0, len(self.todo), ROUND_SOURCES):
            yield self.todo[begin : begin + ROUND_SOURCES]

    def holds(self, sample_id: str) -> bool:
        """Whether a clip of a source that `rounds` has yielded, and that is not finished, is in the shards."""
        return sample_id in self.stored

    def known_hashes(self) -> Iterator[pa.Table]:
        """Yields tables of HASHES_SCHEMA: what duplicates of the clips in the shards look like."""
        rows = [
            {"sample_id": sample, "source": clip.source, "content_hash": clip.content_hash,
             "perceptual_hash": clip.perceptual_hash, "start_s": clip.span[0], "end_s": clip.span[1]}
            for sample, clip in self.stored.items()
        ]  # fmt: skip
        yield pa.Table.from_pylist(rows, HASHES_SCHEMA)

    def finish(self, row_id: str, record: SourceRecord) -> SourceRecord:
        """Records that a source of `rounds` needs no more work, and discards its stored clips that it no longer has.

        A source that could not be opened has its `row_id` as only clip, and keeps those in the shards. Returns the
        record to save.
        """
        stored = self.stored_of_row.get(row_id, [])
        if record.sample_ids == [row_id]:
            record.sample_ids = [*record.sample_ids, *stored]
        for sample in set(stored) - set(record.sample_ids):
            if self.holds(sample):
                self.discard(sample)
        self.add_finished(row_id, record)
        return record

    def add_finished(self, row_id: str, record: SourceRecord) -> None:
        """Counts a source that needs no more work, and its clips."""
        self.stats.asked += len(record.sample_ids)
        self.remarks.update(record.remarks)
        self.records[row_id] = record

    def discard(self, sample_id: str) -> None:
        """Marks a clip of the shards, which was counted as written, for removal."""
        self.mark_stale(sample_id)
        self.stats.written -= 1

    def mark_stale(self, sample_id: str) -> None:
        """Marks a clip of the shards for removal."""
        self.stale.setdefault(self.stored.pop(sample_id).shard, set()).add(sample_id)

    def add_todo(self, row: SourceRow, failed: list[str]) -> None:
        """Adds a source to open. A clip that the shards hold is skipped only if it belongs in the same bucket."""
        stored = [
            f"{bucket_of(self.stored[sample].shard)}/{sample}" for sample in self.stored_of_row.get(row.row_id, [])
        ]
        self.todo.append((row, stored + failed))

    def remove_stale(self, folder: str) -> None:
        """Drops stale clips in the index, which must describe their shards."""
        for shard, samples in self.stale.items():
            why = "repeated, no longer asked for, or of a changed file"
            log.info(f"prep: drops {len(samples)} clips of {shard.rpartition('/')[2]}: {why}")
        if self.stale:
            drop_samples(folder, self.stale)
        self.stale.clear()


def check_output_folder(data: DataConfig, rows: list[SourceRow], stored: dict[str, StoredClip]) -> set[str]:
    """Returns the names of the recipe's buckets.

    Raises UserError if the shards hold only clips of other sources or other buckets: then `data.output` is the wrong
    folder.
    """
    wanted = {bucket_name(*shape) for shape in data.shapes}
    if not stored:
        return wanted
    advice = "Set data.output to another folder, or delete this one"
    if not {clip.source for clip in stored.values()} & {row.source for row in rows}:
        example = next(iter(stored.values())).source
        raise UserError(
            f"data.output: {data.output} holds {len(stored)} clips of other sources, such as {example}, and none that "
            f"data.captions names. {advice}"
        )
    found = {bucket_of(clip.shard) for clip in stored.values()}
    if not found & wanted:
        names, asked = (", ".join(sorted(buckets)) for buckets in (found, wanted))
        raise UserError(f"data.output: {data.output} holds clips of {names}; the recipe asks for {asked}. {advice}")
    return wanted


def reconcile(
    data: DataConfig,
    rows: list[SourceRow],
    stored: dict[str, StoredClip],
    repeated: dict[str, set[str]],
    saved: SavedProgress,
    stats: PrepStats,
) -> ResumeState:
    """Compares the recipe's rows with the shards and the saved progress; counts in `stats` what needs no work.

    Raises UserError as `check_output_folder` does.
    """
    wanted = check_output_folder(data, rows, stored)
    state = ResumeState(stats, stored=dict(stored), stale={shard: set(samples) for shard, samples in repeated.items()})
    by_id = {row.row_id: row for row in rows if not row.reason or row.reason == "missing_file"}
    for sample, clip in stored.items():
        row, record = by_id.get(clip.row_id), saved.records.get(clip.row_id)
        if row is None or _has_changed(row, clip) or bucket_of(clip.shard) not in wanted:
            state.mark_stale(sample)
        elif record and not _has_changed(row, record) and sample not in record.sample_ids:
            state.mark_stale(sample)  # the recipe cuts the source differently now
        else:
            state.stored_of_row.setdefault(clip.row_id, []).append(sample)
    for clip in state.stored.values():
        stats.count_written(clip.source)
    for row in rows:
        _resume_row(row, state, saved)
    return state


def _resume_row(row: SourceRow, state: ResumeState, saved: SavedProgress) -> None:
    """Enters a row as finished, failed, or still to do."""
    mine = state.stored_of_row.get(row.row_id, [])
    if row.reason == "missing_file" and mine:  # the clips of a deleted file stay
        clip = state.stored[mine[0]]
        state.add_finished(row.row_id, SourceRecord(row.source, clip.source_size, clip.source_version, mine))
        return
    if row.reason:
        state.stats.asked += 1
        file = {"sample_id": row.row_id, "source": row.source, "source_size": row.size, "source_version": row.version}
        state.stats.count_failure(file | {"reason": row.reason, "message": row.message})
        return
    record = saved.records.get(row.row_id)
    if record is None or _has_changed(row, record):
        state.add_todo(row, [])
        return
    missing = [sample for sample in record.sample_ids if sample not in state.stored]
    failures = [failure for sample in missing if (failure := saved.permanent_failure(sample, record, state.stored))]
    for failure in failures:
        state.stats.count_failure(failure)
    if len(failures) == len(missing):
        state.add_finished(row.row_id, record)
    else:
        state.add_todo(row, [failure["sample_id"] for failure in failures])


def _has_changed(row: SourceRow, known: StoredClip | SourceRecord) -> bool:
    """Whether the row's file differs from the known one. A file that is gone has not changed."""
    return row.reason != "missing_file" and (row.size, row.version) != (known.source_size, known.source_version)
