"""`sora inspect --check`: reads every byte of a shard folder, and compares the index with the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.shard_index import describe
from sora_train.errors import UserError, first_of, one_line
from sora_train.index import FOLDER, KINDS, find_damaged, read
from sora_train.log import log
from sora_train.schema import shard_files
from sora_train.storage import hide_password, resolve


def check_shards(folder: str) -> None:
    """Reads every page of every shard and of the index.

    Raises UserError that names files whose checksums don't match, and shards that the index describes otherwise.
    `sora prep` itself deletes damaged pieces of the index, but not shards.
    """
    system, root = resolve(folder)
    pieces, damaged = [path for kind in KINDS for path in find_damaged(folder, kind)], list[str]()
    rows, clips = _indexed(folder)
    wrong, unknown = list[str](), list[str]()
    for file in shard_files(folder):
        name = file[len(root) + 1 :]
        try:
            with system.open_input_file(file) as opened:
                parquet = pq.ParquetFile(opened, page_checksum_verification=True)
                for group in range(parquet.num_row_groups):
                    parquet.read_row_group(group, use_threads=False)
                size, row = rows.get(name, (-1, 0))
                if size != opened.size():
                    unknown.append(name)
                    continue
                found, table = describe(parquet, name, size)
        except (pa.ArrowException, OSError) as error:
            damaged.append(f"{file} ({one_line(str(error))})")
            continue
        if row != _row_hash(found) or clips[name] != sum(value for _, value in _clip_hashes(table)):
            wrong.append(name)
    if rows and unknown:
        log.info(f"inspect: the index does not describe {first_of(unknown)}; `sora prep` adds them")
    if damaged:
        also = f". So are pieces of the index, which it restores: {'; '.join(pieces)}" if pieces else ""
        raise UserError(
            f"damaged: {'; '.join(damaged)}. Delete these files and run `sora prep` again{also}", code="shards"
        )
    if pieces:
        raise UserError(f"damaged: {'; '.join(pieces)}. Run `sora prep` again, which restores them", code="shards")
    if wrong:
        raise UserError(
            f"the index describes {first_of(wrong)} otherwise than they are. Delete {hide_password(folder)}/{FOLDER} "
            "and run `sora prep` again",
            code="shards",
        )


def _indexed(folder: str) -> tuple[dict[str, tuple[int, int]], Counter[str]]:
    """The size in bytes and a hash of the row of each shard in the index, and the sum of the hashes of its clips."""
    rows, clips = dict[str, tuple[int, int]](), Counter[str]()
    for table in read(folder, "shards"):
        rows |= {row["shard"]: (row["bytes"], _row_hash(row)) for row in table.to_pylist()}  # the last one is valid
    for table in read(folder, "clips"):
        for shard, value in _clip_hashes(table):
            clips[shard] += value
    return rows, clips


def _row_hash(row: dict[str, Any]) -> int:
    """Hash of a row of SHARDS without what is dropped, which only the index knows."""
    return hash(repr(row | {"dropped": []}))


def _clip_hashes(table: pa.Table) -> Iterator[tuple[str, int]]:
    """The shard of each row of CLIPS, and a hash of the row."""
    return ((row["shard"], hash(repr(row))) for row in table.to_pylist())
