"""Columns of the clips of a bucket in the order of its shards, from the index, without opening the shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sora_train.index import CLIPS, read, shard_places

Run = tuple[int, pa.Table]
"""Rows whose numbers follow each other from this one on."""


def clip_columns(
    folder: str,
    columns: Sequence[str],
    shards: pa.ChunkedArray,
    rows: NDArray[np.int64],
    indexed: NDArray[np.bool_],
    read_shard: Callable[[int], pa.Table],
) -> pa.Table:
    """Columns of all rows of these shards, in their order, as views of what was read.

    `shards` are paths relative to the folder, `rows` their numbers of rows, `indexed` whether the index knows them.
    `read_shard` reads the columns of a shard that is not indexed, or not completely, or whose rows are scattered.
    """
    starts = np.cumsum(rows) - rows
    runs = _indexed_runs(folder, columns, shards, starts, indexed) if set(columns) <= set(CLIPS.names) else []
    runs.sort(key=lambda run: run[0])
    firsts = np.array([first for first, _ in runs], np.int64)
    ends = firsts + [len(table) for _, table in runs]
    tables: list[pa.Table] = []
    for shard, (start, count) in enumerate(zip(starts.tolist(), rows.tolist(), strict=True)):
        low, high = np.searchsorted(firsts, [start, start + count])
        # Complete: the runs begin at the shard's first row, follow each other, and end at its last one.
        edges = np.concatenate([[start], ends[low:high]])
        if count and np.array_equal(edges[:-1], firsts[low:high]) and edges[-1] == start + count:
            tables += [table for _, table in runs[low:high]]
        elif count:
            tables.append(read_shard(shard))
    return pa.concat_tables(tables).replace_schema_metadata(None)


def _indexed_runs(
    folder: str, columns: Sequence[str], shards: pa.ChunkedArray, starts: NDArray[np.int64], indexed: NDArray[np.bool_]
) -> list[Run]:
    """Runs of rows of the index. A run does not cross a shard's end."""
    runs: list[Run] = []
    for table in read(folder, "clips", [*columns, *(name for name in ("shard", "row") if name not in columns)]):
        shard = shard_places(table, shards).fill_null(-1).to_numpy()
        numbers = np.where((shard >= 0) & indexed[shard], starts[shard] + table["row"].to_numpy(), -1)
        cuts = np.flatnonzero((np.diff(numbers) != 1) | (np.diff(shard) != 0)) + 1
        if len(cuts) > len(table) // 4 + len(starts):
            return []  # the rows are scattered: slices would take more than they save
        bounds = [0, *cuts.tolist(), len(table)]
        found = table.select(list(columns))
        runs += [
            (int(numbers[first]), found.slice(first, end - first))
            for first, end in itertools.pairwise(bounds)
            if end > first and numbers[first] >= 0
        ]
    return runs
