"""Opens a folder of shards: the rows of each bucket and split, from the index, or from the footers of other shards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import ENCODING_KEY, SHARD_SCHEMA, bucket_of, holdout_hash
from sora_train.shard_list import SHARD_LIST, held_out_rows, list_known, lists
from sora_train.storage import resolve

Split = Literal["train", "holdout"]
COLUMNS = ["sample_id", "source", "captions", "latents", "text", "tokens"]  # that `decode_rows` reads
OPENERS = 16  # footers of a remote folder that are fetched in parallel
BLOCK_ROWS = 2**20
"""Rows of shards whose split is decided at a time."""


def open_shards(folder: str, holdout_fraction: float = 0.0) -> pa.Table:
    """The folder's shards as rows of SHARD_LIST, sorted by path.

    Reads the footers of shards that the index does not know, and their sources if clips are held out. The table is
    small, so one process can read it for all. Raises UserError for a file that is not a shard of the folder's manifest.
    """
    manifest, (system, root) = Manifest.load(folder), resolve(folder)
    known, unknown = list_known(folder, holdout_fraction)
    for name, encoding in zip(known["shard"].to_pylist(), known["encoding_hash"].to_pylist(), strict=True):
        _check_encoding(f"{root}/{name}", str(encoding), folder, manifest)
    with ThreadPoolExecutor(OPENERS) as pool:
        read = pool.map(lambda name: _read_shard(system, folder, name, manifest, holdout_fraction), unknown)
        table = pa.concat_tables([known, pa.Table.from_pylist(list(read), SHARD_LIST)])
    return table if not unknown else table.take(pc.sort_indices(table["shard"]))


@dataclass(frozen=True)
class BucketShards:
    """Shards of a bucket, sorted by path, and which of their rows belong to the split."""

    names: pa.ChunkedArray
    """Paths relative to the folder."""
    groups: pa.ChunkedArray
    """Lists of the rows of each row group."""
    taken: pa.ChunkedArray | None
    """Lists of whether each row belongs to the split; None: all do."""
    rows: NDArray[np.int64]
    """Rows of each file, of any split."""
    indexed: NDArray[np.bool_]
    """Whether the index knows each file."""
    ends: NDArray[np.int64]
    """Rows of the split up to the end of each file."""

    def locate(self, file: int, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """(Row group, row in it) of rows of the split, counted from the file's first one."""
        rows = self.rows_taken(file)[rows]
        ends = np.cumsum(self.groups[file].values.to_numpy())
        groups = np.searchsorted(ends, rows, side="right")
        return list(zip(groups.tolist(), (rows - np.concatenate([[0], ends])[groups]).tolist(), strict=True))

    def rows_taken(self, file: int) -> NDArray[np.int64]:
        """The rows of a file that belong to the split."""
        if self.taken is None:
            return np.arange(self.rows[file])
        return np.flatnonzero(self.taken[file].values.to_numpy(zero_copy_only=False))

    def commonest_group(self) -> int:
        """The most frequent number of rows of a row group; the largest of several."""
        sizes, counts = np.unique(_flat(self.groups), return_counts=True)
        return int(sizes[np.flatnonzero(counts == counts.max())[-1]])


def split_by_bucket(shards: pa.Table, split: Split) -> dict[str, BucketShards]:
    """The shards of each bucket that have rows of the split, by the bucket's name."""
    buckets = pa.array([bucket_of(str(name)) for name in shards["shard"].to_pylist()], pa.string())
    names = sorted(map(str, buckets.unique().to_pylist()))
    found = {name: _of_split(shards.filter(pc.equal(buckets, pa.scalar(name))), split) for name in names}
    return {name: shards for name, shards in found.items() if len(shards.ends)}


def _of_split(table: pa.Table, split: Split) -> BucketShards:
    rows = rows_of(table)
    if table["held_out"].null_count:  # no split
        taken, counts = None, rows if split == "train" else np.zeros_like(rows)
    if not table["held_out"].null_count or len(_flat(table["dropped"])):
        taken, counts = _rows_taken(table, rows, split)
    kept = np.flatnonzero(counts)
    names, groups = (table[name].take(kept) for name in ("shard", "groups"))
    indexed = table["bytes"].is_valid().to_numpy()[kept]
    return BucketShards(names, groups, taken and taken.take(kept), rows[kept], indexed, np.cumsum(counts[kept]))


def _rows_taken(table: pa.Table, rows: NDArray[np.int64], split: Split) -> tuple[pa.ChunkedArray, NDArray[np.int64]]:
    """Lists of whether each row belongs to the split, and how many of a shard's rows do."""
    blocks: list[pa.ListArray] = []
    counts = [np.zeros(0, np.int64)]
    for start, stop in _blocks(np.cumsum(rows)):
        part, lengths = table.slice(start, stop - start), rows[start:stop]
        held_out = np.zeros(lengths.sum(), bool) if part["held_out"].null_count else _flat(part["held_out"])
        taken = held_out == (split == "holdout")
        starts = np.cumsum(lengths) - lengths
        taken[np.repeat(starts, _lengths(part["dropped"])) + _flat(part["dropped"])] = False
        blocks.append(lists(taken, lengths, pa.bool_()))
        before = np.concatenate([[0], np.cumsum(taken)])
        counts.append(before[starts + lengths] - before[starts])
    return pa.chunked_array([lists(np.zeros(0, bool), [], pa.bool_()), *blocks]), np.concatenate(counts)


def rows_of(table: pa.Table) -> NDArray[np.int64]:
    """Rows of each shard of SHARD_LIST, including dropped ones."""
    ends = np.concatenate([[0], np.cumsum(_flat(table["groups"]), dtype=np.int64)])
    return np.diff(ends[np.concatenate([[0], np.cumsum(_lengths(table["groups"]))])])


def _blocks(ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """First file, and last file + 1, of parts with BLOCK_ROWS rows or little more."""
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = min(len(ends), 1 + int(np.searchsorted(ends, before + BLOCK_ROWS)))
        yield start, stop
        start = stop


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_flatten(column).to_numpy()


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_value_length(column).to_numpy()


def _read_shard(system: fs.FileSystem, folder: str, name: str, manifest: Manifest, holdout_fraction: float) -> dict:
    """A row of SHARD_LIST from a shard's own footer."""
    path = f"{resolve(folder)[1]}/{name}"
    with shard_errors(path):
        file = pq.ParquetFile(path, filesystem=system, page_checksum_verification=True)
        check_columns(path, file.schema_arrow)
        encoding = (file.metadata.metadata or {}).get(ENCODING_KEY, manifest.encoding_hash.encode()).decode()
        _check_encoding(path, encoding, folder, manifest)
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:
            raise OSError(f"its row groups hold {sum(groups)} rows, not {file.metadata.num_rows}")
        held_out = None
        if holdout_fraction:
            sources = [str(source) for source in file.read(columns=["source"])["source"].to_pylist()]
            hashes = {source: holdout_hash(source) for source in set(sources)}
            held_out = held_out_rows(np.array([hashes[source] for source in sources], np.uint64), holdout_fraction)
    return {"shard": name, "encoding_hash": encoding, "groups": groups, "dropped": [], "held_out": held_out}


def check_columns(path: str, schema: pa.Schema) -> None:
    """Raises UserError if a file in a bucket's folder is not a shard."""
    for column in COLUMNS:
        wanted = SHARD_SCHEMA.field(column).type
        if (place := schema.get_field_index(column)) < 0 or schema.field(place).type != wanted:
            raise UserError(
                f"{path} is not a shard: it has no column {column} of type {wanted}. Move it out of the folder",
                code="shards",
            )


def _check_encoding(path: str, encoding: str, folder: str, manifest: Manifest) -> None:
    if encoding != manifest.encoding_hash:
        raise UserError(
            f"{path} has the encoding {encoding}, {folder}/manifest.json has {manifest.encoding_hash}. "
            "A folder holds one encoding: encode into another data.output",
            code="shards",
        )


@contextmanager
def shard_errors(path: str) -> Iterator[None]:
    """Turns errors of reading a shard into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is gone: the shards were changed. Run the same command again", code="shards") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} can't be read as a shard ({error}). To repair it, delete this file and run `sora prep` again: it "
            "encodes only what is missing",
            code="shards",
        ) from error
