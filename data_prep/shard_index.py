"""Keeps the index of a shard folder (`sora_train/index.py`) in step with the shards, and drops clips in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.sources import row_id
from sora_train.data.opening import check_columns, rows_of
from sora_train.errors import UserError
from sora_train.index import (
    CLIPS,
    KINDS,
    SHARDS,
    Kind,
    append,
    clip_rows,
    compact,
    delete_damaged,
    last_rows,
    read,
    shard_places,
    shard_row,
)
from sora_train.index_rows import OF_SHARD
from sora_train.log import log
from sora_train.schema import ENCODING_KEY
from sora_train.shard_list import list_known
from sora_train.storage import resolve, storage_errors

COLUMNS = [*OF_SHARD, "captions"]
READ_AT_ONCE, AHEAD = 8, 64  # shards in parallel, since remote storage takes long to answer; and how many are queued
APPEND_ROWS = 200_000
"""Clips that are appended to the index at once."""
MAX_PIECES = 64
"""Pieces of one kind of the index, after which they are merged."""
OTHER_ENCODING = "other frames, VAE, text encoder or code"


def stored_clips(
    folder: str, encoding_hash: str, difference: str = OTHER_ENCODING, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yields the clips in the shards as rows of CLIPS, or some of its columns, without dropped ones.

    They come from the index, or from the shards that it does not describe. Raises UserError for a shard that can't be
    read, or one of another encoding, with the `difference`.
    """
    found = _compare(folder, encoding_hash, difference)
    names = list(columns or CLIPS.names)
    for table in read(folder, "clips", [*names, *({"shard", "row"} - set(names))]):
        places = shard_places(table, found.complete["shard"])
        if found.dropped is not None:
            codes = places.fill_null(-1).to_numpy()
            numbers = found.starts[codes] + table["row"].to_numpy()
            places = pc.if_else(pa.array(np.isin(numbers, found.dropped)), None, places)
        yield table.filter(places.is_valid()).select(names)
    for _, clips in _read_shards(folder, found.others, encoding_hash, difference):
        yield clips.select(names)


def sync_index(folder: str, encoding_hash: str, difference: str = OTHER_ENCODING) -> None:
    """Makes the index describe exactly the shards that are there. Needs the folder's lock.

    Raises UserError as `stored_clips`.
    """
    for kind in KINDS:
        delete_damaged(folder, kind)
    compact_index(folder, above=MAX_PIECES)
    delete_empty(folder)
    found = _compare(folder, encoding_hash, difference)
    if not found.others:
        return
    log.info(f"prep: adds {len(found.others)} shards that the index of {folder} does not describe")
    if found.begun:  # by a damaged piece, a kill, or a shard that was replaced under its name
        begun = pa.array(sorted(found.begun), pa.string())
        compact(folder, "clips", above=0, keep=lambda table: table.filter(shard_places(table, begun).is_null()))
    rows, clips = [], []
    for row, table in _read_shards(folder, found.others, encoding_hash, difference):
        rows.append(found.rows.get(row["shard"], row))
        clips.append(table)
        if sum(map(len, clips)) >= APPEND_ROWS:
            _append(folder, rows, clips)
            rows, clips = [], []
    _append(folder, rows, clips)


def compact_index(folder: str, above: int = 1, prune: bool = False) -> None:
    """Merges the pieces of the index if a kind has more than `above`. Needs the folder's lock.

    `prune` also removes rows about shards that are gone.
    """
    keep: dict[Kind, Callable[[pa.Table], pa.Table]] = {}
    if prune:
        names = pa.array([str(name) for name in list_known(folder)[0]["shard"].to_pylist()], pa.string())
        keep["clips"] = lambda table: table.filter(shard_places(table, names).is_valid())
        keep["shards"] = lambda table: table.filter(pc.is_in(table["shard"], value_set=names))
    for kind in KINDS:
        compact(folder, kind, 0 if kind in keep else above, keep.get(kind))


def delete_empty(folder: str) -> None:
    """Deletes shards all of whose clips are dropped. Needs the folder's lock."""
    (known, _), (system, root) = list_known(folder), resolve(folder)
    gone = pc.list_value_length(known["dropped"]).to_numpy() == rows_of(known)
    with storage_errors(folder, "cleaned up"):
        for name in known["shard"].take(np.flatnonzero(gone & (rows_of(known) > 0))).to_pylist():
            system.delete_file(f"{root}/{name}")


def drop_rows(folder: str, rows: Mapping[str, list[int]]) -> None:
    """Drops clips, given by shard (its path relative to the folder) and row. Needs the folder's lock.

    The shards stay as they are, except those that have no clip left, which are deleted.
    """
    table = _shard_rows(folder, list(rows))
    names = [str(name) for name in table["shard"].to_pylist()]
    if missing := set(rows) - set(names):
        raise KeyError(f"the index of {folder} does not describe {sorted(missing)[0]}")
    before: list[Any] = table["dropped"].to_pylist()
    dropped = [sorted({*old, *rows[name]}) for name, old in zip(names, before, strict=True)]
    append(folder, "shards", _with_dropped(table, dropped))
    delete_empty(folder)


def all_dropped(folder: str, names: Sequence[str]) -> pa.Table:
    """The rows of SHARDS of these shards, with all clips dropped."""
    table = _shard_rows(folder, names)
    return _with_dropped(table, [list(range(count)) for count in rows_of(table).tolist()])


@dataclass(frozen=True)
class Comparison:
    """The index compared with the shards that are there."""

    complete: pa.Table
    """SHARD_LIST of shards that the index describes, with all of their clips."""
    starts: np.ndarray
    """The number of clips in `complete` before each shard."""
    dropped: np.ndarray | None
    """Numbers of dropped clips, counted over `complete`, if any."""
    others: list[str]
    """Shards that it does not describe, or not completely."""
    begun: set[str]
    """Those of `others` that have clips in the index."""
    rows: dict[str, dict]
    """Rows of SHARDS, by shard, for those of `others` whose row is right."""


def _compare(folder: str, encoding_hash: str, difference: str) -> Comparison:
    known, others = list_known(folder)
    for name, encoding in zip(known["shard"].to_pylist(), known["encoding_hash"].to_pylist(), strict=True):
        _check_encoding(folder, str(name), str(encoding), encoding_hash, difference)
    names = pa.concat_arrays([*known["shard"].chunks, pa.array(others, pa.string())])
    counts, sums = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    for table in read(folder, "clips", ["shard", "row"]):
        places = shard_places(table, names)
        rows, there = table["row"].to_numpy()[places.is_valid().to_numpy(False)], places.drop_null().to_numpy()
        counts += np.bincount(there, minlength=len(names))
        np.add.at(sums, there, rows + 1)
    size = rows_of(known)
    complete = (counts[: len(known)] == size) & (sums[: len(known)] == size * (size + 1) // 2)
    kept = known.take(np.flatnonzero(complete))
    starts = np.cumsum(size[complete]) - size[complete]
    dropped = np.concatenate(
        [start + rows for start, rows in zip(starts, _dropped(kept), strict=True) if len(rows)] or [np.zeros(0, int)]
    )
    incomplete = known.take(np.flatnonzero(~complete))
    incomplete_names = [str(name) for name in incomplete["shard"].to_pylist()]
    lacking = [*incomplete_names, *others]
    begun = {str(name) for name in names.filter(pa.array(counts > 0)).to_pylist()} & set(lacking)
    right = {row["shard"]: row for row in _shard_rows(folder, incomplete_names).to_pylist()} if len(incomplete) else {}
    return Comparison(kept, starts, dropped if len(dropped) else None, lacking, begun, right)


def _dropped(table: pa.Table) -> Iterator[np.ndarray]:
    for rows in table["dropped"]:
        yield rows.values.to_numpy()


def _shard_rows(folder: str, names: Sequence[str]) -> pa.Table:
    """The valid rows of SHARDS of these shards."""
    wanted = pa.array(names, pa.string())
    found = [table.filter(pc.is_in(table["shard"], value_set=wanted)) for table in read(folder, "shards")]
    return last_rows(pa.concat_tables([SHARDS.empty_table(), *found]), "shard")


def _with_dropped(table: pa.Table, dropped: list[list[int]]) -> pa.Table:
    place = SHARDS.get_field_index("dropped")
    return table.set_column(place, SHARDS.field(place), pa.array(dropped, SHARDS.types[place]))


def _read_shards(folder: str, names: list[str], encoding_hash: str, difference: str) -> Iterator[tuple[dict, pa.Table]]:
    """A row of SHARDS and the rows of CLIPS of each shard, from its own columns."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        for first in range(0, len(names), AHEAD):  # few shards are held at a time
            part = names[first : first + AHEAD]
            yield from pool.map(lambda name: _read_shard(folder, name, encoding_hash, difference), part)


def _read_shard(folder: str, name: str, encoding_hash: str, difference: str) -> tuple[dict, pa.Table]:
    system, root = resolve(folder)
    path = f"{root}/{name}"
    try:
        with system.open_input_file(path) as opened:
            file = pq.ParquetFile(opened, page_checksum_verification=True)
            check_columns(path, file.schema_arrow)
            encoding = (file.metadata.metadata or {}).get(ENCODING_KEY, b"").decode()
            _check_encoding(folder, name, encoding, encoding_hash, difference)
            return describe(file, name, opened.size())
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"data.output: shard {path} can't be read ({error}). Delete it and run the same command again",
            code="shards",
        ) from None


def describe(file: pq.ParquetFile, name: str, size: int) -> tuple[dict, pa.Table]:
    """A row of SHARDS and the rows of CLIPS of a shard, from its own columns."""
    table = file.read(columns=COLUMNS, use_threads=False)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    encoding = (file.metadata.metadata or {}).get(ENCODING_KEY, b"").decode()
    sources: list[Any] = table["source"].to_pylist()
    captions: list[Any] = table["captions"].to_pylist()
    ids = [row_id(source, tuple(texts)) for source, texts in zip(sources, captions, strict=True)]
    return shard_row(name, size, encoding, groups, sources), clip_rows(table, name, ids)


def _check_encoding(folder: str, name: str, found: str, wanted: str, difference: str) -> None:
    if found != wanted:
        raise UserError(
            f"data.output: {folder} holds shards of another encoding ({name.rpartition('/')[2]}): {difference}. "
            f"Encodings never mix: set data.output to another folder, or delete {folder} to encode all again; if only "
            "this file is foreign, move it away",
            code="shards",
        )


def _append(folder: str, rows: list[dict], clips: list[pa.Table]) -> None:
    append(folder, "clips", pa.concat_tables([CLIPS.empty_table(), *clips]))
    append(folder, "shards", pa.Table.from_pylist(rows, SHARDS))
