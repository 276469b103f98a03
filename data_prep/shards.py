"""Shards on storage: reads which clips they hold, writes new ones, removes clips."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import ENCODING_KEY, ROW_GROUP, SHARD_SCHEMA, shard_files
from sora_train.shard_list import dropped_rows, without_rows
from sora_train.storage import DRAFT_PREFIX, atomic_output, resolve, storage_errors


def read_shards(folder: str) -> Iterator[tuple[str, pa.Table]]:
    """Yields the path and the rows of each shard, without dropped ones."""
    system, _ = resolve(folder)
    dropped = dropped_rows(folder)
    for file in shard_files(folder):
        with system.open_input_file(file) as opened:
            yield file, without_rows(pq.ParquetFile(opened, page_checksum_verification=True).read(), dropped.get(file))


def remove_unfinished(folder: str) -> None:
    """Deletes the unfinished files of a killed run."""
    system, path = resolve(folder)
    with storage_errors(folder, "cleaned up"):
        for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True)):
            if info.type == fs.FileType.File and info.base_name.startswith(DRAFT_PREFIX):
                system.delete_file(info.path)


def shard_name(number: int) -> str:
    """A new name, unique even if two runs use the same number."""
    return f"part-{number:06d}-{uuid.uuid4().hex[:8]}.parquet"


def next_number(folder: str) -> int:
    """The number of the next shard, which is sorted behind those in the folder."""
    names = [file.rpartition("/")[2].split("-") for file in shard_files(folder)]
    return 1 + max((int(parts[1]) for parts in names if parts[0] == "part" and parts[1].isdecimal()), default=-1)


def write_shard(system: fs.FileSystem, path: str, encoding_hash: str, tables: Iterable[pa.Table]) -> None:
    """Writes the columns of SHARD_SCHEMA of tables as one shard, complete or not at all, by row groups.

    The memory of one row group suffices, except on an object store.
    """
    with atomic_output(system, path) as file:
        write_row_groups(file, encoding_hash, tables)


def write_row_groups(file: BinaryIO, encoding_hash: str, tables: Iterable[pa.Table]) -> None:
    """Writes tables to an open file, by row groups. Of each table it takes the columns of SHARD_SCHEMA."""
    schema = SHARD_SCHEMA.with_metadata({ENCODING_KEY: encoding_hash.encode()})
    # Latents don't compress, and uncompressed pages can be read from a memory map without a copy. Checksums, since
    # nothing else would detect a flipped byte in a latent.
    encoding = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    encoding |= {"write_batch_size": 4}  # after so many clips a page may end; a page of 32 long clips has 26 MB
    with pq.ParquetWriter(file, schema, **encoding) as writer:
        for group in row_groups(table.select(SHARD_SCHEMA.names) for table in tables):
            writer.write_table(group, row_group_size=ROW_GROUP)


def row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins and cuts tables to ROW_GROUP rows each, without a copy; the last may have fewer."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        while count + len(table) >= ROW_GROUP:
            missing = ROW_GROUP - count
            yield pa.concat_tables([*held, table.slice(0, missing)])
            held, count, table = [], 0, table.slice(missing)
        if len(table):
            held.append(table)
            count += len(table)
    if held:
        yield pa.concat_tables(held)


def pick_rows(table: pa.Table, rows: Sequence[int]) -> Iterator[pa.Table]:
    """Rows of a table in ascending order, as slices, which are not copied."""
    for _, run in groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]):
        numbers = [row for _, row in run]
        yield table.slice(numbers[0], len(numbers))


def manifest_or_none(folder: str) -> Manifest | None:
    """The manifest of a shard set, or None if there is none that this version can read."""
    try:
        return Manifest.load(folder)
    except UserError:
        return None
