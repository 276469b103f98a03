"""The finished shards of a folder, as a table: what a listing shows, described by the index. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sora_train.index import SHARDS, last_rows, read
from sora_train.schema import list_shards
from sora_train.storage import resolve

SHARD_LIST = pa.schema(
    [field for field in SHARDS if field.name != "holdout"] + [pa.field("held_out", pa.list_(pa.bool_()))]
)
"""`held_out`: whether each row's source is held out; null without a held-out split."""


def list_known(folder: str, holdout_fraction: float = 0.0) -> tuple[pa.Table, list[str]]:
    """Lists a folder's shards: rows of SHARD_LIST for those that the index describes, and the paths of the others.

    Paths are relative to the folder. Both are sorted by path. A shard with another size than in the index is unknown.
    """
    _, root = resolve(folder)
    infos = list_shards(folder)
    names = pa.array([info.path[len(root) + 1 :] for info in infos], pa.string())
    columns = [name for name in SHARDS.names if name != "holdout" or holdout_fraction]
    found = [_with_held_out(table, holdout_fraction) for table in read(folder, "shards", columns)]
    indexed = last_rows(pa.concat_tables([SHARD_LIST.empty_table(), *found]), "shard")
    places = pc.index_in(names, value_set=indexed["shard"].combine_chunks())
    sizes = np.array([info.size or 0 for info in infos], np.int64)
    known = indexed["bytes"].take(places).to_numpy() == sizes  # null becomes NaN
    others = [info.path[len(root) + 1 :] for info, is_known in zip(infos, known.tolist(), strict=True) if not is_known]
    return indexed.take(places.take(np.flatnonzero(known))), others


def dropped_rows(folder: str) -> dict[str, np.ndarray]:
    """The rows of shards that the index drops, ascending, by the shard's path on the filesystem."""
    (known, _), (_, root) = list_known(folder), resolve(folder)
    some = known.filter(pc.greater(pc.list_value_length(known["dropped"]), pa.scalar(0)))
    dropped: list[Any] = some["dropped"].to_pylist()
    return {f"{root}/{name}": np.array(rows) for name, rows in zip(some["shard"].to_pylist(), dropped, strict=True)}


def without_rows(table: pa.Table, dropped: np.ndarray | None) -> pa.Table:
    """A table without these rows."""
    return table if dropped is None else table.take(np.delete(np.arange(len(table)), dropped))


def held_out_rows(hashes: np.ndarray, holdout_fraction: float) -> np.ndarray:
    """Which sources are held out, by their `holdout_hash` as uint64."""
    # In whole numbers: float64 would round a hash. h < x is h < ceil(x) for a whole h.
    return hashes < np.uint64(math.ceil(holdout_fraction * 2**64))


def lists(values: np.ndarray, lengths: Sequence[int] | np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """Consecutive parts of an array, of these lengths, as lists."""
    offsets: pa.Int32Array = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values, kind))


def _with_held_out(table: pa.Table, holdout_fraction: float) -> pa.Table:
    """Rows of SHARDS, at most a row group's, as rows of SHARD_LIST."""
    held_out = pa.nulls(len(table), pa.list_(pa.bool_()))
    if holdout_fraction:
        rows = held_out_rows(pc.list_flatten(table["holdout"]).to_numpy(), holdout_fraction)
        held_out = lists(rows, pc.list_value_length(table["holdout"]).to_numpy(), pa.bool_())
    columns = [held_out if name == "held_out" else table[name] for name in SHARD_LIST.names]
    return pa.table(columns, schema=SHARD_LIST)
