"""`sora prep RECIPE --compact`: writes shards again that have many dropped clips, merges small ones, and the index.

The order of the clips stays, so a run resumes on the new shards as on the old ones. At every moment, also after a kill,
the index shows each clip exactly once:

1. A row for the new shard, with all clips dropped, is added before the file appears.
2. The file is written, and its clips are added to the index.
3. One piece of the index brings the new shard's clips in and drops those of the old ones.
4. The old files are deleted; `sync_index` deletes them if the command was killed before.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.shard_index import all_dropped, compact_index, describe, sync_index
from data_prep.shards import remove_unfinished, shard_name, write_row_groups
from sora_train.data.opening import rows_of
from sora_train.errors import UserError
from sora_train.index import SHARDS, append
from sora_train.locks import run_lock
from sora_train.log import log, progress
from sora_train.manifest import Manifest
from sora_train.schema import SHARD_SCHEMA, bucket_of
from sora_train.shard_list import list_known, without_rows
from sora_train.storage import atomic_write, in_bytes, resolve, storage_errors

WORTH_SHARE = 0.2
"""A shard is written again if this share of its clips is dropped."""
SMALL = 0.5
"""A shard is merged with its neighbours if it is smaller than this share of `prep.shard_mb`."""


@dataclass(frozen=True)
class Shard:
    """A shard of the index: its path relative to the folder, dropped rows, and the bytes of the others."""

    name: str
    bytes: int
    rows: int
    dropped: np.ndarray

    @property
    def share_dropped(self) -> float:
        """The share of its clips that are dropped."""
        return len(self.dropped) / max(1, self.rows)

    @property
    def live_bytes(self) -> float:
        """Bytes of the clips that are not dropped."""
        return self.bytes * (1 - self.share_dropped)


def compact_shards(folder: str, shard_bytes: int) -> None:
    """Compacts a shard folder. Raises UserError if it is in use, has no manifest, or a shard can't be read."""
    key = Manifest.load(folder).encoding_hash
    with run_lock(folder, "sora prep"):
        remove_unfinished(folder)
        sync_index(folder, key)
        before, reported = list_shards_of_index(folder), time.monotonic()
        groups, names = list(groups_to_write(before, shard_bytes)), [shard.name for shard in before]
        for done, group in enumerate(groups, 1):
            first, last = names.index(group[0].name), names.index(group[-1].name)
            name = name_between(group, *names[max(0, first - 1) : first], *names[last + 1 : last + 2])
            write_again(folder, key, group, name)
            names[first : last + 1] = [name]
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                progress(f"prep: {done} of {len(groups)} groups of shards written again")
        compact_index(folder, prune=True)
        after = list_shards_of_index(folder)
    sizes = [in_bytes(sum(shard.bytes for shard in shards)) for shards in (before, after)]
    log.info(f"prep: {len(before)} shards, {sizes[0]}, are now {len(after)}, {sizes[1]}, with the same clips")


def list_shards_of_index(folder: str) -> list[Shard]:
    """The shards of a folder, sorted by path."""
    known, _ = list_known(folder)
    columns = (known[name].to_pylist() for name in ("shard", "bytes"))
    rows, dropped = rows_of(known).tolist(), [np.array(rows.as_py(), np.int64) for rows in known["dropped"]]
    return [Shard(str(name), int(size or 0), *rest) for name, size, *rest in zip(*columns, rows, dropped, strict=True)]


def groups_to_write(shards: list[Shard], shard_bytes: int) -> Iterator[list[Shard]]:
    """Neighbours of a bucket that are small or have many dropped clips, at most `shard_bytes` together."""
    group: list[Shard] = []
    for shard in [*shards, None]:
        wanted = shard and (shard.share_dropped >= WORTH_SHARE or shard.live_bytes < SMALL * shard_bytes)
        fits = shard and group and bucket_of(shard.name) == bucket_of(group[0].name)
        if wanted and fits and sum(one.live_bytes for one in [*group, shard]) <= shard_bytes:
            group.append(shard)
            continue
        if len(group) > 1 or any(one.share_dropped >= WORTH_SHARE for one in group):
            yield group
        group = [shard] if shard and wanted else []


def write_again(folder: str, encoding_hash: str, group: list[Shard], name: str) -> None:
    """Writes the clips of neighbouring shards that are not dropped as one shard, and deletes the old ones."""
    system, root = resolve(folder)
    content = io.BytesIO()
    write_row_groups(content, encoding_hash, _live_tables(system, root, group))
    file = content.getbuffer()
    row, clips = describe(pq.ParquetFile(pa.BufferReader(pa.py_buffer(file))), name, file.nbytes)
    if len(clips) != sum(one.rows - len(one.dropped) for one in group):
        raise RuntimeError(f"{name} would have {len(clips)} clips, not those of {[one.name for one in group]}")
    hidden = row | {"dropped": list(range(len(clips)))}
    append(folder, "shards", pa.Table.from_pylist([hidden], SHARDS))
    atomic_write(system, f"{root}/{name}", file)
    append(folder, "clips", clips)
    old = all_dropped(folder, [one.name for one in group])
    append(folder, "shards", pa.concat_tables([old, pa.Table.from_pylist([row], SHARDS)]))
    with storage_errors(folder, "cleaned up"):
        for one in group:
            system.delete_file(f"{root}/{one.name}")


def name_between(group: list[Shard], *neighbours: str) -> str:
    """A name for the new shard that is sorted as the group among its neighbours."""
    bucket, first = group[0].name.rpartition("/")[0], group[0].name
    for number in (shard.name.rpartition("/")[2].split("-")[1:2] for shard in group):
        for _ in range(100 if number and number[0].isdecimal() else 0):
            name = f"{bucket}/{shard_name(int(number[0]))}"
            if all((name < other) == (first < other) for other in neighbours):
                return name
    return f"{first.removesuffix('.parquet')}-{shard_name(0)}"


def _live_tables(system: fs.FileSystem, root: str, group: list[Shard]) -> Iterator[pa.Table]:
    for shard in group:
        path = f"{root}/{shard.name}"
        try:
            with system.open_input_file(path) as file:
                opened, first = pq.ParquetFile(file, page_checksum_verification=True), 0
                for number in range(opened.num_row_groups):
                    table = opened.read_row_group(number, use_threads=False)
                    inside = shard.dropped[(shard.dropped >= first) & (shard.dropped < first + len(table))] - first
                    first += len(table)
                    for field in SHARD_SCHEMA:  # a column that was added later
                        if field.name not in table.column_names:
                            table = table.append_column(field, pa.nulls(len(table), field.type))
                    yield without_rows(table, inside)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path} can't be read ({error}). Delete it and run `sora prep` again", code="shards"
            ) from None
