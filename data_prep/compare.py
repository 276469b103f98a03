"""Compares rows of captions, clips in the shards, and saved progress: a join by hash partition, in bounded memory.

Rows, clips and records of a source are in one partition, since all have its `row_id`. Records are compared with the
clips there; the few failures are looked up at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.reasons import PERMANENT
from data_prep.sources import LINE, MISSING, SourceRows, is_repeat
from data_prep.spool import ID, Partitions, first_rows, id_hashes, places_in, text_hashes, to_ids
from data_prep.stored import ROW_BITS, StoredClips

TODO, FAILED, DONE = 0, 1, 2
"""Outcomes of a row: its source is to be opened, it can't be used, or it needs no more work."""
CLIP_COLUMNS = ["row_id", "sample_id", "source", "source_size", "source_version"]
RECORD_COLUMNS = ["row_id", "source_size", "source_version", "sample_ids", "remarks"]
FAILURE_COLUMNS = ["sample_id", "source_size", "source_version", "reason", "duplicate_of"]


@dataclass(frozen=True)
class SavedProgress:
    """What earlier runs saved: each yields tables with some columns, of `index.SOURCES` and of QUARANTINE_SCHEMA.

    Later rows of an id replace earlier ones.
    """

    sources: Callable[[Sequence[str]], Iterator[pa.Table]]
    failures: Callable[[Sequence[str]], Iterator[pa.Table]]


NO_PROGRESS = SavedProgress(lambda columns: iter([]), lambda columns: iter([]))


@dataclass
class Comparison:
    """What to do with each row, and with each clip in the shards."""

    outcome: NDArray[np.int8]
    """TODO, FAILED or DONE of each row."""
    asked: int = 0
    """Number of clips that the DONE rows ask for."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Number of DONE rows by the kinds of their remarks."""
    clips: int = 0
    """Number of different clips in the shards."""
    kept: int = 0
    """Number of these clips that stay."""
    kept_sources: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Hashes of the sources of clips that stay."""
    per_shard: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Number of clips that stay in each shard."""
    stale: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Places of clips to remove, sorted."""
    skip: pa.Table = field(default_factory=lambda: SKIP.empty_table())
    """Clips to skip, sorted by the number of their row: their ids (`sample`), and their places in the shards or -1."""
    failures: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Numbers of the saved failures that hold, sorted."""
    is_strange: bool = True
    """Whether no clip in the shards belongs to a row, so the folder is probably the wrong one."""


CLIPS = pa.schema({"row_id": ID, "sample": ID, "size": pa.int64(), "version_hash": pa.int64(), "place": pa.int64(),
                   "source_hash": pa.int64()})  # fmt: skip
RECORDS = pa.schema({"row_id": ID, "size": pa.int64(), "version_hash": pa.int64(), "samples": pa.list_(ID),
                     "remarks": pa.list_(pa.string())})  # fmt: skip
FAILURES = pa.schema({"sample": ID, "size": pa.int64(), "version_hash": pa.int64(), "permanent": pa.bool_(),
                      "duplicate_of": ID})  # fmt: skip
ROW_PART = pa.schema({"row_id": ID, "size": pa.int64(), "version_hash": pa.int64(), "code": pa.int8(),
                      "number": pa.int64()})  # fmt: skip
SKIP = pa.schema({"number": pa.int64(), "sample": ID, "place": pa.int64()})
LOST = pa.schema({"number": pa.int64(), "sample": ID, "size": pa.int64(), "version_hash": pa.int64()})
OPEN_ROWS = pa.schema({"number": pa.int64(), "asked": pa.int64(), "remarks": pa.list_(pa.string())})
OPEN = 3  # an outcome that depends on the failures
NO_ORIGINAL = to_ids(pa.array([""]))[0].as_py()  # the original of a failure that is no duplicate


def compare(rows: SourceRows, stored: StoredClips, wanted: NDArray[np.bool_], saved: SavedProgress) -> Comparison:
    """Compares rows, clips and saved progress. `wanted` says for each shard whether the recipe has its bucket."""
    parts = Partitions(rows.parts.count)
    for table in stored.read(CLIP_COLUMNS):
        columns: dict[str, Any] = _common(table) | {"sample": to_ids(table["sample_id"]), "place": table["place"]}
        columns["source_hash"] = text_hashes(table["source"])
        parts.add("clips", id_hashes(columns["row_id"]), pa.table(columns, CLIPS))
    for table in saved.sources(RECORD_COLUMNS):
        columns = _common(table) | {"remarks": table["remarks"]}
        ends: Any = pa.array(np.append(0, np.cumsum(_lengths(table["sample_ids"]))), pa.int32())
        columns["samples"] = pa.ListArray.from_arrays(ends, to_ids(pc.list_flatten(table["sample_ids"])))
        parts.add("records", id_hashes(columns["row_id"]), pa.table(columns, RECORDS))
    failures = [FAILURES.empty_table()]
    for table in saved.failures(FAILURE_COLUMNS):
        columns = _common(table, "sample_id", "sample") | {
            "duplicate_of": to_ids(table["duplicate_of"].fill_null(pa.scalar("")))
        }
        columns["permanent"] = pc.is_in(table["reason"], value_set=pa.array(sorted(PERMANENT)))
        failures.append(pa.table(columns, FAILURES))
    join = _Join(len(rows), wanted, pa.concat_tables(failures).combine_chunks())
    for part in sorted({*rows.parts, *parts}):
        join.add(
            rows.parts.read("rows", part) or ROW_PART.empty_table(),
            parts.read("clips", part) or CLIPS.empty_table(),
            parts.read("records", part) or RECORDS.empty_table(),
        )
    return join.finish()


class _Join:
    """Joins one partition after the other."""

    def __init__(self, rows: int, wanted: NDArray[np.bool_], failures: pa.Table):
        self.found = Comparison(np.full(rows, FAILED, np.int8), per_shard=np.zeros(len(wanted), np.int64))
        self.wanted, self.failures = wanted, failures
        self.originals = failures["duplicate_of"].unique()
        self.alive: list[pa.Array] = []  # originals of duplicates that are in the shards
        self.sources, self.stale = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        self.skip, self.lost, self.open = [SKIP.empty_table()], [LOST.empty_table()], [OPEN_ROWS.empty_table()]

    def add(self, rows: pa.Table, clips: pa.Table, records: pa.Table) -> None:
        """Joins a partition."""
        code = rows["code"].to_numpy() & ~LINE
        rows = rows.filter(pa.array((code <= MISSING) & ~is_repeat(rows)))  # the others are FAILED, their clips stale
        is_missing = rows["code"].to_numpy() & ~LINE == MISSING
        clips, records = _by_place(clips), _last(records)
        record = places_in(rows["row_id"], records["row_id"])
        is_known = (record >= 0) & (is_missing | _is_same_file(rows, records, record))
        known = np.flatnonzero(is_known)
        lists = records["samples"].take(record[known])
        counts, samples = _lengths(lists), _flat(lists)
        sample_row = np.repeat(known, counts)

        row = places_in(clips["row_id"], rows["row_id"])
        self.found.is_strange &= not (row >= 0).any()
        places, is_first = clips["place"].to_numpy(), first_rows(clips["sample"]) == np.arange(len(clips))
        self.found.clips += int(is_first.sum())
        kept = (row >= 0) & is_first & self.wanted[places >> ROW_BITS]
        kept &= _at(is_missing, row, False) | _is_same_file(clips, rows, row)
        listed_row = _at(sample_row, places_in(clips["sample"], samples), -1)
        kept &= ~_at(is_known, row, False) | (listed_row == row)  # else the recipe cuts the source differently now
        held = clips["sample"].filter(pa.array(kept)).combine_chunks()
        row, places, stale = row[kept], places[kept], places[~kept]

        is_lost = (places_in(samples, held) < 0) & ~is_missing[sample_row]
        lost = np.flatnonzero(is_lost)
        clip_counts = np.bincount(row, minlength=len(rows))
        lost_counts = np.bincount(sample_row[lost], minlength=len(rows))
        outcome = np.where(is_known, np.where(lost_counts > 0, OPEN, DONE), TODO).astype(np.int8)
        outcome[is_missing] = np.where(clip_counts > 0, DONE, FAILED)[is_missing]
        asked = clip_counts.copy()
        asked[known] = np.where(is_missing[known], asked[known], counts)

        numbers = rows["number"].to_numpy()
        self.found.outcome[numbers] = outcome
        self.found.asked += int(asked[outcome == DONE].sum())
        self._count_remarks(records["remarks"].take(record[is_known & ~is_missing & (outcome == DONE)]))
        self.found.kept += len(row)
        self.found.per_shard += np.bincount(places >> ROW_BITS, minlength=len(self.wanted))
        self.sources.append(np.unique(clips["source_hash"].to_numpy()[kept]))
        self.stale.append(stale)
        if len(self.originals):
            self.alive.append(held.filter(pa.array(places_in(held, self.originals) >= 0)))
        unsure = np.flatnonzero(outcome[row] != DONE)
        self.skip.append(_table(SKIP, numbers[row[unsure]], held.take(unsure), places[unsure]))
        files = rows.select(["number", "size", "version_hash"]).take(sample_row[lost])
        self.lost.append(files.append_column("sample", samples.take(lost)).select(LOST.names))
        undecided = np.flatnonzero(outcome == OPEN)
        remarks = records["remarks"].take(record[undecided])
        self.open.append(_table(OPEN_ROWS, numbers[undecided], asked[undecided], remarks))

    def finish(self) -> Comparison:
        """Looks up the clips that are missing among the failures, and returns the result."""
        found, lost, undecided = self.found, pa.concat_tables(self.lost), pa.concat_tables(self.open)
        newest = self.failures.take(np.arange(len(self.failures))[::-1])
        place = places_in(lost["sample"], newest["sample"])
        alive = pa.concat_arrays([pa.array([NO_ORIGINAL], ID), *self.alive])
        holds = newest["permanent"].to_numpy() & (places_in(newest["duplicate_of"], alive) >= 0)
        holds = _at(holds, place, False) & _is_same_file(lost, newest, place)
        found.failures = np.unique(len(self.failures) - 1 - place[holds])
        numbers = undecided["number"].to_numpy()
        still = lost["number"].to_numpy()[~holds]
        is_done = ~np.isin(numbers, still)
        found.outcome[numbers] = np.where(is_done, DONE, TODO)
        done = undecided.filter(pa.array(is_done))
        found.asked += int(done["asked"].to_numpy().sum())
        self._count_remarks(done["remarks"])
        failed = lost.filter(pa.array(holds))
        skip = _table(SKIP, failed["number"], failed["sample"], np.full(len(failed), -1))
        skip = pa.concat_tables([*self.skip, skip])
        skip = skip.filter(pa.array(found.outcome[skip["number"].to_numpy()] == TODO))
        found.skip = skip.take(np.argsort(skip["number"].to_numpy(), kind="stable")).combine_chunks()
        found.stale = np.sort(np.concatenate(self.stale))
        found.kept_sources = np.unique(np.concatenate(self.sources))
        return found

    def _count_remarks(self, remarks: pa.ChunkedArray) -> None:
        self.found.remarks.update(map(str, _flat(remarks).to_pylist()))


def _common(table: pa.Table, name: str = "row_id", id_name: str = "row_id") -> dict[str, Any]:
    """The columns that rows, clips, records and failures have in common: id, size and version."""
    versions = text_hashes(table["source_version"])
    return {id_name: to_ids(table[name]), "size": table["source_size"], "version_hash": versions}


def _table(schema: pa.Schema, *columns: Any) -> pa.Table:
    return pa.table(list(columns), schema=schema)


def _by_place(clips: pa.Table) -> pa.Table:
    """Clips sorted by their places in the shards, without repeats."""
    return clips.take(np.unique(clips["place"].to_numpy(), return_index=True)[1])


def _last(records: pa.Table) -> pa.Table:
    """The last record of each row."""
    records = records.take(np.arange(len(records))[::-1])
    return records.filter(pa.array(first_rows(records["row_id"]) == np.arange(len(records))))


def _is_same_file(these: pa.Table, others: pa.Table, place: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether size and version of rows are those of the others at these places; not where the place is -1."""
    same = place >= 0
    for name in ("size", "version_hash"):
        same = same & (these[name].to_numpy() == _at(others[name].to_numpy(), place, 0))
    return same


def _at(values: NDArray[Any], places: NDArray[np.int64], default: Any) -> NDArray[Any]:
    """Values at places; the default at -1."""
    return np.append(values, np.array([default], values.dtype))[places]


def _flat(lists: Any) -> pa.Array:
    return pc.list_flatten(lists).combine_chunks()


def _lengths(lists: pa.ChunkedArray | pa.Array) -> NDArray[np.int64]:
    return pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
